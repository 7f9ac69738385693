"""The paper's tables in miniature, on data that needs no network: see `__main__.py`."""
