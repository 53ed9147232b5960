"""Questions from documents: which passages are drawn, what the generator is asked, and which of its questions are kept.

In: passages with their embeddings, a generator, a retriever. Out: questions with answers, evidence and provenance, and for every
other one the reason why it was thrown out. It does not know where passages are stored, nor how work is distributed.
"""
