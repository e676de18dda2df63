"""Hooks for schemathesis: they give generated requests something real to speak of.

A random name names nothing, and a run of 404s proves nothing. So where the generated data are valid, names of objects are
replaced by names of objects that exist: a fixture for reading and changing, a throw-away made a moment before for deleting.
What JSON Schema can't say (a digest that is among the blobs, ports that differ, fields that can't change) is made true the
same way. Invalid data are left as they are: their refusal is the point.

In the stateful phase names come from earlier answers and stay as they are.

Every answer is counted per operation and status; the counts go to $NEXUS_ST_REPORT for the test to judge.
"""

import atexit
import collections
import hashlib
import itertools
import json
import os
import time
import zlib
from urllib.parse import quote

import requests
import schemathesis

API = os.environ["NEXUS_ST_API"]
TOKEN = os.environ["NEXUS_ST_TOKEN"]
REPORT = os.environ["NEXUS_ST_REPORT"]
REGION = f"{API}/v1/regions/local"
PROJECT = f"{REGION}/projects/default"
ORGANIZATION = f"{API}/v1/organizations/default"
# An app of the test's own, running, and a host whose agent is dead.
APP = os.environ["NEXUS_ST_APP"]
DEAD_HOST = os.environ["NEXUS_ST_DEAD_HOST"]

session = requests.Session()
session.headers["Authorization"] = f"Bearer {TOKEN}"
numbers = itertools.count()
counts = collections.defaultdict(collections.Counter)


def call(method, url, **more):
    return session.request(method, url, timeout=30, **more)


def made(url, body):
    if "/tokens/" in url or "/access-keys/" in url:
        # Its text is told once, so there is no PUT.
        url, name = url.rsplit("/", 1)
        answer = call("POST", url, json={**body, "metadata": {"name": name}})
    else:
        answer = call("PUT", url, json=body)
    assert answer.ok, f"{url}: {answer.status_code} {answer.text}"
    return answer.json()


def digest(content):
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def app(image="missing"):
    return {"spec": {"image": image, "replicas": 0}}


def job(image="missing"):
    return {"template": {"image": image}}


def provider():
    return {"issuer": "https://login.example.com", "clientId": "cloudnexus"}


def webhook():
    # Nobody is asked: the address is not one that servers reach from here.
    return {"url": "https://hooks.invalid/cloud", "secret": {"name": FIXTURE, "key": "password"}, "maxAttempts": 1}


def network():
    return {"cidrs": ["10.0.0.0/8"]}


def subnet(name):
    # Of its own, the same each time: what it is can't change.
    number = zlib.crc32(name.encode()) % 60000
    return {"network": FIXTURE, "cidr4": f"10.{number // 250}.{number % 250}.0/24"}


def pool(name):
    # Of its own, the same each time.
    number = zlib.crc32(name.encode()) % 60000
    return {"cidrs": [f"100.{64 + number // 250 % 60}.{number % 250}.0/24"]}


def own_network(name):
    """A network of an object's own: it has one such gateway, or few."""
    # A made-up name may be none.
    name = f"of-{zlib.crc32(str(name).encode())}"
    if not call("GET", f"{PROJECT}/networks/{name}").ok:
        made(f"{PROJECT}/networks/{name}", {"spec": network()})
    return name


def balancer():
    check = {"http": {"path": "/"}, "intervalSeconds": 5}
    return {"subnet": FIXTURE, "listeners": [{"port": 80, "targets": [{"to": {"app": FIXTURE}}], "check": check}]}


EMPTY = digest(b"")
WASM = {"format": "wasm", "digest": EMPTY, "blobs": [{"digest": EMPTY, "size": 0}]}
# Whoever is there from the beginning, and a policy that permits nothing.
ADMIN = [{"kind": "User", "name": "admin"}]
NOTHING = "permit (principal, action, resource) when { false };"
# By the last part of a collection's path: where the fixture is, and a body for a throw-away. Kinds without one are not made
# by users.
BODIES = {
    "organizations": (f"{API}/v1/organizations", lambda n: {"spec": {}}),
    "projects": (f"{API}/v1/projects", lambda n: {"spec": {}}),
    "users": (f"{ORGANIZATION}/users", lambda n: {"spec": {}}),
    "service-accounts": (f"{ORGANIZATION}/service-accounts", lambda n: {"spec": {}}),
    "groups": (f"{ORGANIZATION}/groups", lambda n: {"spec": {}}),
    "role-bindings": (f"{ORGANIZATION}/role-bindings", lambda n: {"spec": {"role": "viewer", "subjects": ADMIN}}),
    "policies": (f"{ORGANIZATION}/policies", lambda n: {"spec": {"text": NOTHING}}),
    "tokens": (f"{ORGANIZATION}/tokens", lambda n: {"spec": {"holder": {"kind": "User", "name": "admin"}}}),
    "access-keys": (f"{ORGANIZATION}/access-keys", lambda n: {"spec": {"holder": {"kind": "User", "name": "admin"}}}),
    "identity-providers": (f"{ORGANIZATION}/identity-providers", lambda n: {"spec": provider()}),
    "zones": (f"{REGION}/zones", lambda n: {"spec": {}}),
    "cells": (f"{REGION}/cells", lambda n: {"spec": {}}),
    "images": (f"{PROJECT}/images", lambda n: {"spec": WASM}),
    "apps": (f"{PROJECT}/apps", lambda n: app()),
    "jobs": (f"{PROJECT}/jobs", lambda n: {"spec": job()}),
    "cron-jobs": (f"{PROJECT}/cron-jobs", lambda n: {"spec": {"schedule": "0 0 1 1 *", "job": job()}}),
    "secrets": (f"{PROJECT}/secrets", lambda n: {"spec": {"data": {"password": n}}}),
    # Each after what it names.
    "networks": (f"{PROJECT}/networks", lambda n: {"spec": network()}),
    "subnets": (f"{PROJECT}/subnets", lambda n: {"spec": subnet(n)}),
    "security-groups": (f"{PROJECT}/security-groups", lambda n: {"spec": {"network": FIXTURE}}),
    "nics": (f"{PROJECT}/nics", lambda n: {"spec": {"subnet": FIXTURE}}),
    "address-pools": (f"{REGION}/address-pools", lambda n: {"spec": pool(n)}),
    "prefix-lists": (f"{PROJECT}/prefix-lists", lambda n: {"spec": {"cidrs": ["192.0.2.0/24"]}}),
    "route-tables": (f"{PROJECT}/route-tables", lambda n: {"spec": {"network": FIXTURE}}),
    "peerings": (f"{PROJECT}/peerings", lambda n: {"spec": {"network": FIXTURE, "peerNetwork": f"nowhere-{n}"}}),
    "internet-gateways": (f"{PROJECT}/internet-gateways", lambda n: {"spec": {"network": own_network(n)}}),
    "nat-gateways": (f"{PROJECT}/nat-gateways", lambda n: {"spec": {"network": own_network(n)}}),
    "floating-ips": (f"{PROJECT}/floating-ips", lambda n: {"spec": {"pool": FIXTURE}}),
    "load-balancers": (f"{PROJECT}/load-balancers", lambda n: {"spec": balancer()}),
    "dns-zones": (f"{PROJECT}/dns-zones", lambda n: {"spec": {"network": FIXTURE, "domain": f"{n}.example"}}),
    "webhooks": (f"{PROJECT}/webhooks", lambda n: {"spec": webhook()}),
    "routes": (f"{PROJECT}/routes", lambda n: {"spec": {"host": f"{n}.example.com", "app": APP}}),
}
# An organization has twenty identity providers at most, a project as many webhooks; of networks there are not many more.
FEW = ("identity-providers", "webhooks", "networks", "subnets", "security-groups", "nics")
FEW += ("address-pools", "prefix-lists", "route-tables", "peerings", "internet-gateways", "nat-gateways")
FEW += ("floating-ips", "load-balancers", "dns-zones")
# What reads and changes; never deleted.
FIXTURE = "st-fixture"
# An app that is scaled, and changed by nothing else.
SCALED = "st-scaled"


@schemathesis.hook
def after_load_schema(context, schema):
    assert call("PUT", f"{PROJECT}/blobs/{EMPTY}", data=b"").ok
    # No app of the run is refused for its quota: `repair_app` bounds what they place.
    quota = {"spec": {"quota": {"instances": 100000, "cpu": "999999", "memory": "999999Ti"}}}
    answer = call("PATCH", f"{API}/v1/projects/default", json=quota)
    assert answer.ok, answer.text
    for url, body in BODIES.values():
        made(f"{url}/{FIXTURE}", body(FIXTURE))
    made(f"{PROJECT}/apps/{SCALED}", app())
    made(f"{ORGANIZATION}/users/{SIGNER}", {"spec": {}})
    invited = call("POST", f"{ORGANIZATION}/users/{SIGNER}:invite").json()
    sign_in(grant_type="urn:cloudnexus:invitation", invitation=invited["invitation"])


# Somebody who signs in, and is left alone else.
SIGNER = "st-signer"


def sign_in(**grant):
    """Opens a session; answers its name."""
    form = {"grant_type": "password", "username": f"default/{SIGNER}", "password": "seven green kettles", **grant}
    answer = requests.post(f"{API}/oauth2/token", data=form, timeout=30)
    assert answer.ok, f"{answer.status_code} {answer.text}"
    return answer.json()["session"]


def kind_of(path):
    """The collection's word of an operation on one object, such as `apps`."""
    parts = path.split("/")
    return parts[-2] if parts[-1].startswith("{name}") else None


def is_positive(case, location):
    """Whether this part of the request was generated to be valid."""
    if case.meta is None:
        return False
    for where, component in case.meta.components.items():
        if where.value == location:
            return component.mode.is_positive
    return True


def phase(case):
    return case.meta.phase.name.value if case.meta is not None else ""


def pick(url, good=lambda o: True):
    found = [o["metadata"]["name"] for o in call("GET", url).json()["items"] if good(o)]
    return found[0] if found else None


# Ten a second: for a machine that is busy with other tests.
TRIES = 600


def instance(of_app):
    """A placed instance of an app. A deleted one is replaced soon."""
    for _ in range(TRIES):
        name = pick(f"{PROJECT}/instances", lambda o: o["spec"]["app"] == of_app and o["status"].get("host"))
        if name:
            return name
        time.sleep(0.1)
    raise AssertionError(f"no instance of {of_app}")


def rolling():
    """An app that has an older template to go back to, and whose rollout waits to be promoted."""
    name = "st-rolling"
    for _ in range(2):
        spec = {"image": FIXTURE, "runtime": "function", "replicas": 0, "env": {"N": str(next(numbers))}}
        made(f"{PROJECT}/apps/{name}", {"spec": {**spec, "rollout": {"strategy": "canary"}}})
        for _ in range(TRIES):
            status = call("GET", f"{PROJECT}/apps/{name}").json()["status"].get("rollout", {})
            if status.get("phase") == "Waiting":
                return name
            if status.get("phase") == "Complete":
                break
            time.sleep(0.1)
    raise AssertionError(f"no rollout waits: {status}")


def real_name(case, kind):
    # Only a request that is valid whole can delete.
    deletes = case.method == "DELETE" and case.meta.generation.mode.is_positive
    if kind == "instances":
        return instance("st-victim" if deletes else APP)
    if kind == "events":
        return pick(f"{PROJECT}/events?limit=1")
    if kind == "regions":
        return "local"
    if kind == "sessions":
        return sign_in() if deletes else pick(f"{ORGANIZATION}/sessions?limit=1")
    if kind == "app-revisions":
        return pick(f"{PROJECT}/app-revisions?limit=1")
    if case.path.endswith((":undo", ":promote")):
        return rolling()
    if kind == "deliveries":
        # Each test makes another.
        return call("POST", f"{PROJECT}/webhooks/{FIXTURE}:test").json()["metadata"]["name"]
    if kind == "usages":
        # Named as its project.
        return "default"
    if kind == "hosts":
        if deletes:
            return DEAD_HOST
        return pick(f"{REGION}/hosts", lambda o: o["metadata"]["name"] != DEAD_HOST)
    if not deletes:
        return FIXTURE
    url, body = BODIES[kind]
    # With those of other requests.
    name = f"st-gone-{next(numbers) % 4 if kind in FEW else next(numbers)}"
    made(f"{url}/{name}", body(name))
    return name


def sent(body):
    """The bytes that a body of octets is sent as."""
    body = getattr(body, "data", body)
    if isinstance(body, str):
        body = body.encode()
    return body if isinstance(body, bytes) else b""


def repair_path(case):
    names = case.path_parameters
    if "region" in names:
        names["region"] = "local"
    if "project" in names:
        names["project"] = "default"
    if "organization" in names:
        names["organization"] = "default"
    kind = kind_of(case.path)
    # A name that is only tried out creates its object; every fourth put is let do that.
    creates = case.method == "PUT" and kind in BODIES and next(numbers) % 4 == 0
    if kind and "name" in names:
        if creates:
            names["name"] = f"st-put-{next(numbers) % 8}"
        else:
            name = real_name(case, kind)
            if name:
                names["name"] = name
    if "digest" in names:
        names["digest"] = digest(sent(case.body)) if case.method == "PUT" else EMPTY


def repair_query(case):
    query = case.query or {}
    if "cursor" in query:
        # Only a cursor that this same list gave is one.
        del query["cursor"]
        url = API + case.formatted_path
        asked = {**query, "limit": 1}
        answer = call("GET", url, params=asked)
        cursor = answer.json().get("metadata", {}).get("cursor") if answer.ok else None
        if cursor:
            query["cursor"] = cursor


def repair_headers(case):
    if getattr(case.meta.phase.data, "parameter", None) == "Authorization":
        # It is left out on purpose; a header that a hook sets would bring it back.
        return
    # Schemathesis thinks little of the quotes of an entity tag: it takes a bare number for a valid one as soon as a hook has
    # touched the request.
    for name in ("If-Match", "If-None-Match"):
        value = str(case.headers.get(name, "")) if case.headers else ""
        if value.isdigit():
            case.headers[name] = f'"{value}"'
        # Hardly ever is it the object's revision; what comes after this check wants to be reached too.
        if value and is_positive(case, "header") and next(numbers) % 8:
            del case.headers[name]
    if case.headers and case.path.endswith(("/tokens", "/access-keys")):
        # Its answer can't be repeated.
        case.headers.pop("Idempotency-Key", None)
    # Generators are fond of a few keys, and all but the first request with one would be refused. Some stay.
    if case.headers and "Idempotency-Key" in case.headers and is_positive(case, "header") and next(numbers) % 8:
        case.headers["Idempotency-Key"] = f"st-{next(numbers)}"
    # Only a secret that is there signs, and only few names are worth looking up.
    if case.headers and "/images" in case.path:
        # They are in the region `global`, and so would the secret be.
        case.headers.pop("Callback", None)
    if case.headers and "Callback" in case.headers and is_positive(case, "header"):
        case.headers["Callback"] = "https://hooks.invalid/done"
        case.headers["Callback-Secret"] = f"{FIXTURE}/password"
    elif case.headers and is_positive(case, "header"):
        case.headers.pop("Callback-Secret", None)
    # What never settles would be waited for.
    if case.headers and "wait=" in str(case.headers.get("Prefer", "")):
        case.headers["Prefer"] = "wait=0"


def repair_rules(rules):
    """Rules whose ids differ, that name what there is, and ports only where there are ports."""
    seen = {}
    for rule in rules:
        if isinstance(rule, dict):
            rule["remotes"] = [{"cidr": "192.0.2.0/24"} for _ in rule.get("remotes") or []]
            with_ports = rule.get("protocol") in ("tcp", "udp")
            rule["ports"] = [443, "8000-8010"] if rule.get("ports") and with_ports else []
            seen[rule.get("id")] = rule
    return list(seen.values())


def repair_app(spec):
    # An instance's NIC would be nobody's to delete.
    spec.pop("nics", None)
    if spec.get("secrets"):
        # A function has no files.
        spec["secrets"] = [] if spec.get("runtime") == "function" else [{"name": FIXTURE}]
    # No app is to be with itself, and any name may be its own.
    if isinstance(spec.get("constraints"), list):
        spec["constraints"] = [c for c in spec["constraints"] if not str(c).startswith("with=")]
    elif "with=" in str(spec.get("constraints")):
        spec["constraints"] = "not-with=nobody"
    if spec.get("runtime") == "function":
        for field in ("ports", "command", "args", "storageClass", "init", "sidecars", "shared"):
            spec.pop(field, None)
        for check in (spec.get("health") or {}).values():
            if isinstance(check, dict) and "exec" in (check.get("probe") or {}):
                check["probe"] = {"tcp": {"port": 8080}}
    # Parts have names of their own, and variables and folders that are in nobody's way.
    for field in ("init", "sidecars"):
        for i, part in enumerate(spec.get(field) or []):
            part["name"] = f"{field}-{i}"
            if part.get("secrets"):
                part["secrets"] = [{"name": FIXTURE}]
    if isinstance(spec.get("shared"), dict):
        spec["shared"].pop("path", None)
    if spec.get("ports"):
        spec["ports"] = list({p["port"]: p for p in spec["ports"]}.values())
    if spec.get("replicas") is not None:
        spec["replicas"] = int(spec["replicas"]) % 4
    if isinstance(spec.get("autoscale"), dict):
        # Bounds that agree with each other and with whatever the app was before.
        spec["autoscale"].update(minReplicas=1, maxReplicas=4, schedule=[])
        if spec["autoscale"].get("strategy") == "schedule":
            spec["autoscale"]["strategy"] = "target"
        if isinstance(spec["autoscale"].get("target"), dict):
            spec["autoscale"]["target"].pop("cpuPercent", None)
    # Only that of a revision that is kept.
    spec.pop("imageDigest", None)
    spec.pop("partDigests", None)
    if spec.get("image") == "busybox":
        # The only image there is: all other apps wait for theirs.
        spec["replicas"] = 0
        spec.pop("autoscale", None)


def repair_job(spec, patch):
    """A job that no image keeps from being begun, and that ends at once if there is one."""
    if isinstance(spec.get("template"), dict):
        template = spec["template"]
        template["runtime"] = "container"
        repair_app(template)
        # A quota has room for them all.
        template.pop("resources", None)
        if template.get("image") == "busybox":
            template["image"] = "missing"
    for field in ("completions", "parallelism"):
        if spec.get(field) is not None:
            spec[field] = int(spec[field]) % 4 + 1
    if patch:
        # What a job does can't change.
        for field in ("template", "completions", "indexed"):
            spec.pop(field, None)


def repair_body(case):
    body = case.body
    if not isinstance(body, dict):
        return
    if case.path.endswith("/architecture/scale"):
        body.pop("region", None)
        body.update(service=SCALED, project="default")
        return
    if case.path.endswith(":undo") and next(numbers) % 4:
        # Hardly ever is it the number of a revision; what comes after that check wants to be reached too.
        body.pop("toRevision", None)
    kind = kind_of(case.path) or case.path.split("/")[-1]
    metadata = body.get("metadata")
    if isinstance(metadata, dict):
        if case.method == "POST":
            number = next(numbers)
            metadata["name"] = f"st-post-{number % 6 if kind in FEW else number}"
        elif "name" in metadata and "name" in case.path_parameters:
            metadata["name"] = case.path_parameters["name"]
        # It has to agree with the path's, which for images is no matter of the path.
        metadata.pop("region", None)
        if "project" in metadata:
            metadata["project"] = case.path_parameters.get("project", "default")
        if "organization" in metadata:
            metadata["organization"] = case.path_parameters.get("organization", "default")
        # In a PUT it is a precondition: see If-Match.
        metadata.pop("revision", None)
        # Else it could not be deleted.
        metadata.pop("deletionProtection", None)
    if kind == "image-gc":
        # What is being uploaded stays.
        body["dryRun"] = True
    spec = body.get("spec")
    if not isinstance(spec, dict):
        return
    if kind == "apps":
        repair_app(spec)
        # Only global apps say where they run.
        spec.pop("regions", None)
    if kind == "jobs":
        repair_job(spec, case.method == "PATCH")
        if case.method == "PUT":
            # The fixture's, which can't change, or a new one's.
            spec.update(job())
            for field in ("completions", "indexed"):
                spec.pop(field, None)
    if kind == "cron-jobs":
        # What an expression or a zone means no pattern says.
        for field, known in (("schedule", "0 0 1 1 *"), ("timeZone", "Europe/Berlin")):
            if field in spec or (field == "schedule" and case.method != "PATCH"):
                spec[field] = known
        if isinstance(spec.get("job"), dict):
            repair_job(spec["job"], False)
            # Every run would fail.
            spec["job"].pop("cancelled", None)
    if kind == "regions":
        # What tier a region is of can't change.
        spec.pop("tier", None)
    if kind == "cells":
        # There are no others.
        spec.pop("zone", None)
    if kind == "images" and case.method != "PATCH":
        # What was uploaded to that very project; anything else is refused.
        project = quote(str(case.path_parameters.get("project", "default")), safe="")
        call("PUT", f"{REGION}/projects/{project}/blobs/{EMPTY}", data=b"")
        spec["digest"], spec["blobs"] = EMPTY, [{"digest": EMPTY, "size": 0}]
    # Who and what is named has to be there.
    if kind == "groups":
        spec.pop("users", None)
        spec.pop("serviceAccounts", None)
    if kind == "users":
        spec.pop("identity", None)
    if kind == "identity-providers":
        for field in ("groups", "exchange", "sealedSecret"):
            spec.pop(field, None)
        if case.method != "PATCH":
            spec.update(provider())
    if kind == "secrets":
        # The server writes these.
        for field in ("sealed", "version", "keys"):
            spec.pop(field, None)
        if case.method != "PATCH":
            spec.pop("binary", None)
            spec["data"] = {"password": f"p{next(numbers)}"}
    if kind == "webhooks":
        if case.method == "PATCH":
            for field in ("url", "secret", "enabled"):
                spec.pop(field, None)
        else:
            spec.update(webhook())
            spec["enabled"] = True
    named = (metadata or {}).get("name") if case.method == "POST" else case.path_parameters.get("name")
    if kind in FEW[2:]:
        # What they are of and what addresses they have can't change, and has to fit.
        for field in (
            ("cidrs", "network", "cidr4", "cidr6", "zone", "subnet", "address4", "address6", "instance", "securityGroups")
            + ("routeTable", "routes", "peerProject", "peerNetwork", "pool", "address", "nic", "domain", "records")
            + ("listeners",)
        ):
            spec.pop(field, None)
        if isinstance(spec.get("rules"), list):
            spec["rules"] = repair_rules(spec["rules"])
        if case.method != "PATCH":
            spec.update(BODIES[kind][1](str(named))["spec"])
    if kind in ("role-bindings", "policies", "tokens", "access-keys"):
        spec.pop("project", None)
    if kind == "role-bindings":
        spec["role"], spec["subjects"] = "viewer", ADMIN
    if kind == "policies":
        spec["text"] = NOTHING
        # A guard-rail permits nothing, not even nothing.
        spec.pop("guardRail", None)
    if kind in ("tokens", "access-keys"):
        spec["holder"] = {"kind": "User", "name": "admin"}
        spec.pop("expires", None)
        # The server writes these.
        for field in ("hash", "id", "sealed"):
            spec.pop(field, None)
    if kind == "projects" and "organization" in spec:
        # Who owns a project can't change.
        spec["organization"] = "default"
    if kind == "routes" and case.method != "PATCH":
        spec["host"] = f"r{next(numbers)}.example.com"
    if kind == "hosts":
        # All else is the agent's to say.
        answer = call("GET", f"{REGION}/hosts/{case.path_parameters.get('name')}")
        if answer.ok:
            cordoned = spec.get("cordoned")
            body["spec"] = answer.json()["spec"]
            body["spec"]["cordoned"] = bool(cordoned) if case.method == "PUT" else cordoned


@schemathesis.hook
def before_call(context, case, kwargs):
    if case.meta is None:
        return
    # What is invalid stays so, and is all that is: a wrong body sent to nowhere would tell of nowhere only.
    if is_positive(case, "path"):
        if phase(case) != "stateful":
            repair_path(case)
        elif "digest" in case.path_parameters and case.method == "PUT":
            case.path_parameters["digest"] = digest(sent(case.body))
    if is_positive(case, "query"):
        repair_query(case)
    repair_headers(case)
    if is_positive(case, "body"):
        repair_body(case)


@schemathesis.hook
def after_call(context, case, response):
    counts[case.operation.label][response.status_code] += 1


@atexit.register
def write():
    with open(REPORT, "w") as out:
        json.dump(counts, out, indent=1, sort_keys=True)
