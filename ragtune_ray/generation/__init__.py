"""Turns prompts into text, with transformers in this process or through an OpenAI-compatible server.

In: prompts. Out: completions, whole or streamed, with token counts and log-likelihoods.
This room knows nothing of retrieval or of how a prompt was made.
"""
