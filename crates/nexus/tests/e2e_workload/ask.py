"""Asks the SPIFFE Workload API by the public client, inside a container, and says in JSON what came.

    ask.py everything            certificate, bundles, and a token for this workload's own name
    ask.py token AUDIENCE [ID]   a token, perhaps in another's name
    ask.py validate AUDIENCE T   whose the token is, by the API and by the bundle alone
    ask.py handshake             a TLS handshake with itself by its certificate and bundle, as clients and servers do
"""

import json
import os
import ssl
import sys
import tempfile

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from spiffe import JwtSvid, SpiffeId, WorkloadApiClient


def everything(client):
    svid = client.fetch_x509_svid(timeout=30)
    domain = svid.spiffe_id.trust_domain
    roots = client.fetch_x509_bundles(timeout=30).get_bundle_for_trust_domain(domain)
    keys = client.fetch_jwt_bundles(timeout=30).get_bundle_for_trust_domain(domain)
    life = svid.leaf.not_valid_after_utc - svid.leaf.not_valid_before_utc
    # The region's authority stands between the certificate and the root that is trusted.
    chain = [*svid.cert_chain, next(iter(roots.x509_authorities))]
    for certificate, issuer in zip(chain, chain[1:]):
        certificate.verify_directly_issued_by(issuer)
    return {
        "user": os.getuid(),
        "socket": os.environ["SPIFFE_ENDPOINT_SOCKET"],
        "id": str(svid.spiffe_id),
        "serial": svid.leaf.serial_number,
        "life": life.total_seconds(),
        "roots": len(roots.x509_authorities),
        "keys": len(keys.jwt_authorities),
    }


def token(client, audience, other=None):
    subject = SpiffeId(other) if other else None
    svid = client.fetch_jwt_svid(audience={audience}, subject=subject, timeout=30)
    return {"id": str(svid.spiffe_id), "token": svid.token}


def validate(client, audience, text):
    told = client.validate_jwt_svid(token=text, audience=audience, timeout=30)
    bundle = client.fetch_jwt_bundles(timeout=30).get_bundle_for_trust_domain(told.spiffe_id.trust_domain)
    own = JwtSvid.parse_and_validate(text, bundle, {audience})
    return {"told": str(told.spiffe_id), "own": str(own.spiffe_id)}


def handshake(client):
    context = client.fetch_x509_context(timeout=30)
    svid = context.default_svid
    roots = context.x509_bundle_set.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
    with tempfile.NamedTemporaryFile("wb") as pem:
        key = svid.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        pem.write(b"".join(c.public_bytes(Encoding.PEM) for c in svid.cert_chain) + key)
        pem.flush()
        trusted = "".join(c.public_bytes(Encoding.PEM).decode() for c in roots.x509_authorities)
        sides = []
        for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
            side = ssl.SSLContext(protocol)
            # Who a peer is, is its SPIFFE id and not a host name.
            side.check_hostname = False
            side.verify_mode = ssl.CERT_REQUIRED
            side.load_verify_locations(cadata=trusted)
            side.load_cert_chain(pem.name)
            sides.append(side)
    ways = [ssl.MemoryBIO() for _ in range(2)]
    server = sides[0].wrap_bio(ways[0], ways[1], server_side=True)
    ends = [server, sides[1].wrap_bio(ways[1], ways[0], server_side=False)]
    for _ in range(6):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
    names = [dict(end.getpeercert()["subjectAltName"])["URI"] for end in ends]
    return {"peers": names}


def main():
    what, *arguments = sys.argv[1:]
    methods = {"everything": everything, "token": token, "validate": validate, "handshake": handshake}
    with WorkloadApiClient() as client:
        try:
            print(json.dumps(methods[what](client, *arguments)))
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}))


main()
