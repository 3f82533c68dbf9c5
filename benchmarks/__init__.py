"""How fast fastelbo is, against plain PyTorch: `python -m benchmarks`.

A new case is one entry in cases.py, a new opponent one entry in contenders.py.
"""
