"""From a run to a bundle: fold, export, verify, write.

The only package that may see both training and runtime; commands that take either live here too.
"""
