"""A plugin of pytest: leaves out the tests that take neither a device nor a backend, which the CPU runs elsewhere."""

TAKEN = {"device", "variant", "variants"}


def pytest_collection_modifyitems(config, items):
    kept, left_out = [], []
    for item in items:
        (kept if TAKEN & set(getattr(item, "fixturenames", ())) else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
