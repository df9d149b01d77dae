"""Fold a finished run, export it to ONNX, verify the graphs, and write a bundle.

The only package that imports both training and runtime; commands that take either live here too.
"""
