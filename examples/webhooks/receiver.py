"""Takes what CloudNexus tells of: checks who sent it, and prints each event once, a line of JSON. Needs Python alone.

    python3 receiver.py PORT FILE-WITH-THE-SIGNING-KEY
"""

import base64
import hashlib
import hmac
import http.server
import json
import sys
import threading
import time


def is_genuine(key, headers, body):
    """Whether a message is by whoever has the signing key, and was signed within the last five minutes."""
    sent = headers["webhook-timestamp"]
    if not sent.isdigit() or abs(time.time() - int(sent)) > 300:
        return False
    secret = base64.b64decode(key.removeprefix("whsec_"))
    signed = b".".join([headers["webhook-id"].encode(), sent.encode(), body])
    tag = base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()
    return any(hmac.compare_digest(f"v1,{tag}", given) for given in headers["webhook-signature"].split(" "))


class Receiver(http.server.BaseHTTPRequestHandler):
    key = ""
    seen = set()
    # Requests come side by side: one at a time looks at what was seen, and prints.
    turn = threading.Lock()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        try:
            genuine = is_genuine(self.key, self.headers, body)
        except (AttributeError, TypeError):
            # It has not even the headers.
            genuine = False
        # A message whose answer was lost comes again: its id tells.
        with self.turn:
            if genuine and self.headers["webhook-id"] not in self.seen:
                self.seen.add(self.headers["webhook-id"])
                print(json.dumps(json.loads(body)), flush=True)
        self.send_response(204 if genuine else 401)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    with open(sys.argv[2], encoding="utf-8") as file:
        Receiver.key = file.read().strip()
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Receiver).serve_forever()
