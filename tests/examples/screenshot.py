"""Make docs/images/server.png anew.

python -m tests.examples.screenshot BUNDLE PHOTO
"""

import base64
import sys
from pathlib import Path

from benchmarks.server_load import running_server
from capt_deploy.core.files import write_bytes
from tests.examples.browser import find_chromium, open_page

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "server.png"


def main() -> None:
    """Drop the photo on the page, and write what is to be seen then."""
    bundle, photo = map(Path, sys.argv[1:])
    chromium = find_chromium() or sys.exit("needs Chromium")
    with running_server(bundle) as server, open_page(chromium) as page:
        page.resize(760, 600)
        page.visit(f"http://{server.host}:{server.port}/")
        page.drop(photo.resolve(), 380, 150)
        page.wait_for("document.getElementById('photo').naturalWidth > 0")
        height = page.evaluate("document.body.scrollHeight")
        page.resize(760, height)
        png = page.call("Page.captureScreenshot", format="png")["data"]
    write_bytes(PICTURE, base64.b64decode(png))


if __name__ == "__main__":
    main()
