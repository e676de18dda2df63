"""Makes sigv4.json: requests as botocore signs them. Run by hand when a case is added: pip install botocore; python sigv4.py"""

import datetime
import json
import pathlib
from unittest import mock

import botocore.auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from urllib.parse import urlsplit

KEY, SECRET = "CNXAABCDEFGHIJKLMNOP", "wJalrXUtnFEMI_K7MDENG-bPxRfiCYEXAMPLEKEY"
NOW = datetime.datetime(2027, 1, 15, 8, 0, 0, tzinfo=datetime.timezone.utc)

GENERAL, S3 = botocore.auth.SigV4Auth, botocore.auth.S3SigV4Auth
LINK, S3_LINK = botocore.auth.SigV4QueryAuth, botocore.auth.S3SigV4QueryAuth

CASES = [
    ("plain", GENERAL, "nexus", "GET", "/v1/projects", "", {}, ""),
    ("body", GENERAL, "nexus", "POST", "/v1/projects/shop/apps", "dryRun=true", {"Content-Type": "application/json"}, '{"a": 1}'),
    ("query", GENERAL, "nexus", "GET", "/v1/apps", "b=2&a=1&a=0&empty=&sel=app%3Dweb%2Ctier%21%3Ddb&e=%C3%A4%20x", {}, ""),
    ("escaped path", GENERAL, "nexus", "GET", "/v1/a%20b/%E1%88%B4:verb/x~y_z.-", "", {}, ""),
    ("slash at the end", GENERAL, "nexus", "DELETE", "/v1/apps/", "", {}, ""),
    ("odd headers", GENERAL, "nexus", "PUT", "/v1/apps/web", "", {"X-Amz-Meta-A": "  a   b  c ", "If-Match": '"7"'}, "x"),
    ("s3 get", S3, "s3", "GET", "/bucket/a%20b/../c//d%2Fe/%E1%88%B4", "", {"Range": "bytes=0-9"}, ""),
    ("s3 put", S3, "s3", "PUT", "/bucket/key%2Bplus", "partNumber=1&uploadId=a%2Fb%3D", {"X-Amz-Acl": "private"}, "content"),
    ("s3 list", S3, "s3", "GET", "/bucket", "list-type=2&prefix=a%20b%2B&delimiter=%2F", {}, ""),
    ("link", LINK, "nexus", "GET", "/v1/logs/x", "follow=true", {}, ""),
    ("s3 link", S3_LINK, "s3", "GET", "/bucket/a%20b", "response-content-type=text%2Fplain", {}, ""),
    ("s3 upload link", S3_LINK, "s3", "PUT", "/bucket/a", "", {"X-Amz-Acl": "private"}, ""),
]


def main():
    out = []
    for name, auth, service, method, path, query, headers, body in CASES:
        url = f"https://nexus.example:8443{path}" + (f"?{query}" if query else "")
        request = AWSRequest(method, url, headers=headers, data=body)
        with mock.patch.object(botocore.auth, "get_current_datetime", lambda *a, **k: NOW.replace(tzinfo=None)):
            extra = {"expires": 600} if auth in (LINK, S3_LINK) else {}
            auth(Credentials(KEY, SECRET), service, "eu-1", **extra).add_auth(request)
        parts = urlsplit(request.url)
        sent = [["host", parts.netloc]] + [[k, v] for k, v in request.headers.items()]
        out.append({"name": name, "service": service, "method": method, "path": parts.path, "query": parts.query,
                    "headers": sent, "body": body})
    target = pathlib.Path(__file__).with_name("sigv4.json")
    target.write_text(json.dumps(out, indent=1) + "\n")


main()
