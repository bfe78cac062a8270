"""Prints failures as they come, and at the end what the programs held."""

import collections


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # what one process of xdist's several has
        config.pluginmanager.register(FailuresAtOnce(config))


class FailuresAtOnce:
    """A run may take an hour, and the smallest program is worth looking at before."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        if report.failed:
            errors = [x for x in report.longreprtext.splitlines() if x.startswith("E ")]
            terminal = self.config.get_terminal_writer()
            terminal.line("\n".join(["", report.nodeid, *errors]))


def pytest_terminal_summary(terminalreporter):
    total = collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                total.update(dict(report.user_properties).get("fuzz", {}))
    if not total:
        return
    programs, seconds = total.pop("programs"), total.pop("seconds")
    terminalreporter.section("fuzzed programs")
    blocks = [name for name in total if name.endswith(" blocks")]
    features = [name for name in total if name not in blocks]
    for names in (sorted(features), sorted(blocks)):
        terminalreporter.line(", ".join(f"{name} {total[name]}" for name in names))
    terminalreporter.line(
        f"{programs} programs, {seconds / programs:.2f} s each and process"
    )
