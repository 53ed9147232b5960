"""Where weights come from, which hardware they run on, which model each arm uses, and the encoders.

In: names of models and arms. Out: loaded encoders, model directories, fingerprints.
This room may not know about indexes or prompts.
"""
