"""Where weights come from, which hardware they run on, and which model each arm uses.

In: names of models and arms. Out: loaded encoders, model directories, fingerprints.
This room knows nothing of indexes or prompts.
"""
