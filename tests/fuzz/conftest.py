"""Prints what the fuzzer's programs held, over all processes."""

import collections


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
