from tests.tiny_engine import folders, make  # noqa: F401
