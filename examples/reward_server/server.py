"""A reward server: more for completions that praise, less for long ones. Start it with `python server.py 5000`."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PRAISE = ("great", "good", "beautiful", "wonderful", "funny")


def reward(query: str, completion: str, label: object) -> float:
    """One number for one sample."""
    return sum(completion.count(word) for word in PRAISE) - 0.01 * len(completion)


class Handler(BaseHTTPRequestHandler):
    """Answers batches."""

    def do_POST(self) -> None:
        """Rate each sample of a batch."""
        batch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        rewards = [reward(*each) for each in zip(batch["query"], batch["completions"], batch["labels"], strict=True)]
        answer = json.dumps({"rewards": rewards}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
