"""Turns prompts into text, with transformers in this process or through an OpenAI-compatible server.

In: prompts. Out: completions, whole or streamed, with token counts and log-likelihoods.
This room does not depend on retrieval or on how a prompt was built.
"""
