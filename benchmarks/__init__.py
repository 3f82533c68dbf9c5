"""fastelbo's time and memory, compared with plain PyTorch and other packages: `python -m benchmarks`.

A new case is one entry in cases.py, a new contender one entry in contenders.py.
"""
