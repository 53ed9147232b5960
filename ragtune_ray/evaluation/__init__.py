"""Scores hits and answers, computes confidence intervals, and recommends one arm.

In: answers, gold answers, costs. Out: metrics, a verdict, and in `report/` what people see of it.
This room runs no model.
"""
