"""People's grades of answers: what they are asked, the file of their labels, and how often a judge agrees with them.

In: questions with the answers of several arms, and the file of labels. Out: the next answers to show, each arm's labels, and the
numbers that correct a judge. This half of the room knows neither browser nor terminal.
"""
