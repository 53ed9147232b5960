"""Scores hits and answers, computes confidence intervals, and recommends one arm.

In: answers, gold answers, costs. Out: metrics and a verdict, which `report/` shows to people.
Models are run in `grading/` alone.
"""
