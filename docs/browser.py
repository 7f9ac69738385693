"""Open every page of the built site in headless Chromium: python docs/browser.py build/site.

It needs selenium, chromium and chromedriver. A page fails if the browser logs an error, a picture
does not load, or a phone has to scroll it sideways. The search has to find a word of the reference,
and the navigation has to open on a phone.
"""

import argparse
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

DESKTOP, PHONE = (1366, 900), (390, 844)
BROKEN = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
LOADED = "return document.readyState == 'complete'"
EXCESS = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


class Handler(SimpleHTTPRequestHandler):
    """Serve files without a log."""

    def log_message(self, *arguments):
        """Say nothing."""


def start():
    """Return a browser."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    switches = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync"
    for switch in [*switches.split(), "disable-background-networking", "hide-scrollbars"]:
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


def resize(browser, size, scheme="light"):
    """Give the page a size in CSS pixels, which a window cannot have below 500, and a scheme."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def open_page(browser, address):
    """Load a page and its pictures, and return what is wrong with it."""
    browser.get(address)
    browser.execute_script("for (const i of document.images) i.loading = 'eager'")
    wait = WebDriverWait(browser, 20)
    wait.until(lambda b: b.execute_script(LOADED))
    log = browser.get_log("browser")
    faults = [entry["message"] for entry in log if entry["level"] == "SEVERE"]
    faults += [f"{source} does not load" for source in browser.execute_script(BROKEN)]
    if (excess := browser.execute_script(EXCESS)) > 0:
        faults.append(f"{excess} pixels wider than the screen")
    return faults


def search(browser, home, word):
    """Return the addresses that the search box finds."""
    resize(browser, DESKTOP)
    browser.get(home)
    box = browser.find_element(By.CSS_SELECTOR, "input.sidebar-search")
    box.send_keys(word)
    box.submit()
    finished = (By.XPATH, "//*[@id='search-results']/h2[contains(., 'Search Results')]")
    WebDriverWait(browser, 20).until(lambda b: b.find_elements(*finished))
    links = browser.find_elements(By.CSS_SELECTOR, "#search-results li a")
    return [link.get_attribute("href") for link in links]


def links_on_a_phone(browser, home):
    """Return the words of the links that its button shows."""
    resize(browser, PHONE)
    browser.get(home)
    browser.find_element(By.CSS_SELECTOR, "label.nav-overlay-icon[for=__navigation]").click()
    links = browser.find_elements(By.CSS_SELECTOR, ".sidebar-tree a")
    WebDriverWait(browser, 20).until(lambda b: links[0].rect["x"] >= 0)
    return [link.text for link in links if link.is_displayed()]


def main():
    """Print what is wrong, and fail if anything is."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--screenshots", type=Path, help="a folder for a picture of each page")
    arguments = parser.parse_args()
    server = ThreadingHTTPServer(("localhost", 0), partial(Handler, directory=arguments.site))
    Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://localhost:{server.server_port}/"
    pages = sorted(arguments.site.rglob("*.html"))
    faults = []
    with start() as browser:
        for page in pages:
            path = page.relative_to(arguments.site).as_posix()
            for size, scheme in ((DESKTOP, "light"), (PHONE, "dark")):
                resize(browser, size, scheme)
                found = open_page(browser, home + path)
                faults += [f"{path}, {size[0]} wide: {fault}" for fault in found]
                if arguments.screenshots:
                    picture = arguments.screenshots / f"{path.replace('/', '-')}-{size[0]}.png"
                    browser.save_screenshot(str(picture))
        found = search(browser, home, "kernel_size")
        if not any("reference/python.html" in address for address in found):
            faults.append(f"the search for kernel_size finds {found or 'nothing'}")
        shown = links_on_a_phone(browser, home)
        if "NumPy" not in shown:
            faults.append(f"the navigation on a phone has {shown or 'nothing'}")
    server.shutdown()
    print(*faults, f"{len(pages)} pages, {len(faults)} faults", sep="\n")
    return bool(faults)


if __name__ == "__main__":
    raise SystemExit(main())
