"""Evaluation: question files in, answers and scores with their uncertainty out."""
