"""What the papers claim that this project starts from, tried here: one file for each paper.

The measurements lie beside the code as CSV; every figure and verdict is computed from them.
"""
