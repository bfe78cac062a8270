"""Looks at every page of the built site in a browser, on a desk and on a phone.

    make site-check                                   after make docs; needs Chromium
    python docs/check_site.py --pictures folder       and keeps a picture of each page

A page passes if it is no wider than the window, and none of its links within the site
leads nowhere.
"""

import argparse
import functools
import http.server
import pathlib
import shutil
import sys
import threading

from playwright.sync_api import Page, sync_playwright

SITE = pathlib.Path(__file__).parents[1] / "site"
WIDTHS = {"desk": 1280, "phone": 390}
QUIET = ["--disable-background-networking", "--disable-component-update"]
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
LINKS = "[...document.querySelectorAll('article a[href]')].map(a => a.href)"


class Silent(http.server.SimpleHTTPRequestHandler):
    """A server that prints nothing."""

    def log_message(self, *args: object) -> None:
        """Nothing."""


def problems(page: Page, address: str, name: str, pictures: pathlib.Path | None):
    """What is wrong with one page of the site."""
    for device, width in WIDTHS.items():
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(f"{address}/{name}", wait_until="load")
        if (wider := page.evaluate(WIDER)) > 0:
            yield f"{name}: {wider} pixels wider than a window of {width}"
        if pictures:
            file = f"{name.replace('/', '-').removesuffix('.html')}-{device}.png"
            page.screenshot(path=pictures / file, full_page=True)
    for link in page.evaluate(LINKS):
        if not link.startswith(address):
            continue
        path, _, anchor = link.removeprefix(f"{address}/").partition("#")
        file = SITE / path
        if not file.is_file():
            yield f"{name}: {path} does not exist"
        elif anchor and f'id="{anchor}"' not in file.read_text():
            yield f"{name}: {path} has no #{anchor}"


def main() -> None:
    """Prints what is wrong, and fails if anything is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=pathlib.Path)
    pictures = parser.parse_args().pictures
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("Chromium is not installed: apt-get install chromium, for example.")
    handler = functools.partial(Silent, directory=SITE)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    pages = sorted(x.relative_to(SITE).as_posix() for x in SITE.rglob("*.html"))
    pages = [x for x in pages if not x.startswith(("_", "genindex", "py-", "search"))]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=QUIET)
        page = chromium.new_page()
        # nothing from elsewhere: mathematics is set by a script that is not needed here
        page.route(
            "**", lambda r: r.continue_() if address in r.request.url else r.abort()
        )
        wrong = [x for name in pages for x in problems(page, address, name, pictures)]
        chromium.close()
    print("\n".join(wrong) or f"{len(pages)} pages are as they should be.")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
