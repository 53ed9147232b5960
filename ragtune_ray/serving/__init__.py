"""The HTTP endpoint without Ray: wire formats, API keys, limits, streams and the web page.

In: HTTP requests and a backend that retrieves and generates. Out: HTTP responses.
This room does not know how the backend computes.
"""
