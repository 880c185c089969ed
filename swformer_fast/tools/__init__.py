"""Console tools around the network: `swformer-restore` for pictures and videos, `swformer-eval` for data sets.

They need the extra `restore` (`pip install 'sdo-swformer-fast[restore]'`); nothing else in the package imports them.
"""
