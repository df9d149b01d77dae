"""Graphs in float32, float16, bfloat16 and int8."""
