"""The HTTP endpoint without Ray: routes, API keys, limits, streams and the web page.

In: HTTP requests and a backend that retrieves and generates. Out: HTTP responses in OpenAI's format.
Nothing here depends on how the backend computes.
"""
