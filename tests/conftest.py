"""One profile for the property-based tests: the same examples in every run, and no limit on the time of one."""

import hypothesis

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")
