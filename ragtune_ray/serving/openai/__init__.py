"""The formats of OpenAI's API: chat completions, completions, responses, embeddings and models.

In: request bodies. Out: questions for `answers`, and the answers in the format of their request. A field of OpenAI's API that
this endpoint cannot honour is as if absent where its value asks for nothing, and otherwise refused by name.
"""
