"""A web server of a folder, with ranges of files or without."""

import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple


class Asked(NamedTuple):
    """A request: the name of a file, and the range."""

    name: str
    range: str


@contextlib.contextmanager
def file_server(folder: Path, *, ranges: bool = True, cut: str = "") -> Iterator[tuple[str, list[Asked]]]:
    """Yield the address, and the requests so far. Connections end early in files with the suffix `cut`."""
    asked = list[Asked]()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            file = Path(self.translate_path(self.path))
            wanted = self.headers.get("Range", "")
            asked.append(Asked(file.name, wanted))
            if not file.is_file():
                self.send_error(404)
                return
            content = file.read_bytes()
            if wanted and ranges:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                content = content[int(first) : int(last) + 1]
            self.send_response(206 if wanted and ranges else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            is_cut = cut and file.name.endswith(cut)
            with contextlib.suppress(OSError):
                self.wfile.write(content[: len(content) // 2] if is_cut else content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
