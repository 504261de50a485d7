"""One thread, which is fastest for networks this small, and the same examples in every run of a property-based test."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the scripts that tests start

import hypothesis

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")
