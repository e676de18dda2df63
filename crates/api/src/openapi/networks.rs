//! The paths of [`crate::networks`].

use nexus_model::kind::KindDescriptor;
use nexus_model::plan::MAX_FLOWS;
use serde_json::{Map, Value, json};

use super::operations::{answers, name_parameter, operation, place, success};
use crate::flows::{MOST_SECONDS, NDJSON, USUAL_FLOWS, USUAL_SECONDS};
use crate::networks::{PCAP, PROTOCOLS};
use crate::route::collection_template;

fn query(name: &str, schema: Value, about: &str) -> Value {
    json!({"name": name, "in": "query", "schema": schema, "description": about})
}

fn port(about: &str) -> Value {
    query("port", json!({"type": "integer", "minimum": 1, "maximum": 65_535}), about)
}

fn as_body(schema: &Value) -> Value {
    json!({"application/json": {"schema": schema}})
}

fn here(d: &KindDescriptor) -> Vec<Value> {
    let mut parameters = place(d, true);
    parameters.push(name_parameter(d));
    parameters
}

fn trace(d: &KindDescriptor) -> Value {
    let text = || json!({"type": "string"});
    let hop = json!({
        "type": "object", "required": ["host", "at", "what"],
        "properties": {"host": text(), "at": text(), "what": text()},
    });
    let body = json!({
        "type": "object", "required": ["hops", "verdict"],
        "properties": {
            "hops": {"type": "array", "items": hop, "description": "On its way, in order."},
            "verdict": {"type": "string", "enum": ["delivered", "outside", "gateway", "dropped"]},
            "probed": {"type": "boolean", "description": "Of a probe: whether it came through; absent where that can't be known."},
        },
    });
    let words = PROTOCOLS.map(|(word, _)| word);
    let mut parameters = here(d);
    let mut to = query("to", text(), "An IPv4 or IPv6 address.");
    to["required"] = true.into();
    to["example"] = "10.0.0.5".into();
    parameters.push(to);
    parameters.push(query("protocol", json!({"type": "string", "enum": words}), "TCP, without it."));
    parameters.push(port("Of TCP and UDP, which need one."));
    parameters.push(query("probe", json!({"type": "boolean"}), "Sends such a packet too."));
    let about =
        "What becomes of a new connection's first packet that a NIC sends, by the rules that its host has programmed";
    let good = success("Its way", as_body(&body), &[]);
    json!({"get": operation("traceFromNic", d.plural, about, parameters, answers(vec![("200", good)], &["403", "409"]))})
}

fn capture(d: &KindDescriptor) -> Value {
    let mut parameters = here(d);
    parameters.push(query("address", json!({"type": "string"}), "Only packets from or to this address."));
    parameters.push(port("Only TCP and UDP from or to this port."));
    let file = json!({PCAP: {"schema": {"type": "string", "format": "binary"}}});
    let good = success("A capture file that goes on until its reader leaves", file, &[]);
    let about = "The packets that pass a NIC, which needs the permission `nics:capture` and leaves a record";
    json!({"get": operation("captureAtNic", d.plural, about, parameters, answers(vec![("200", good)], &["403", "409"]))})
}

fn check(d: &KindDescriptor) -> Value {
    let count = || json!({"type": "integer", "minimum": 0});
    let body = json!({
        "type": "object", "required": ["networks", "nics", "differences"],
        "properties": {
            "revision": count(), "networks": count(), "nics": count(),
            "differences": {"type": "array", "items": {"type": "string"}},
        },
    });
    let good = success("What was found", as_body(&body), &[]);
    let about = "In which ways a host's part of tenants' networks is not as it should be";
    json!({"get": operation("checkHost", d.plural, about, here(d), answers(vec![("200", good)], &["403", "409"]))})
}

fn flows(d: &KindDescriptor) -> Value {
    let text = || json!({"type": "string"});
    let port = || json!({"type": "integer", "minimum": 0, "maximum": 65_535});
    let flow = json!({
        "type": "object", "required": ["host", "time", "protocol", "source", "sourcePort", "destination", "port", "bytes"],
        "properties": {
            "host": text(), "time": {"type": "string", "format": "date-time"},
            "dropped": {"type": "string", "description": "Why it was dropped; without it, it was let through."},
            "protocol": {"type": "string", "description": "`tcp`, `udp`, `icmp`, or a number."},
            "source": text(), "sourceNic": text(), "sourcePort": port(),
            "destination": text(), "destinationNic": text(), "port": port(), "bytes": port(),
        },
    });
    let silent = json!({"type": "object", "required": ["host", "why"], "properties": {"host": text(), "why": text()}});
    let body = json!({
        "type": "object", "required": ["items", "silent", "lost"],
        "properties": {
            "items": {"type": "array", "items": flow, "description": "The oldest first."},
            "silent": {"type": "array", "items": silent, "description": "Hosts that did not answer."},
            "lost": {"type": "integer", "minimum": 0, "description": "How many the hosts could not note, since their agents began."},
        },
    });
    let mut parameters = here(d);
    parameters.push(query("nic", text(), "Only those in which this NIC takes part."));
    let since = json!({"type": "integer", "minimum": 1, "maximum": MOST_SECONDS, "default": USUAL_SECONDS});
    parameters.push(query("sinceSeconds", since, "How long ago the oldest is at most, by the hosts' clocks."));
    let limit = json!({"type": "integer", "minimum": 1, "maximum": MAX_FLOWS, "default": USUAL_FLOWS});
    parameters.push(query("limit", limit, "The newest so many."));
    let about = "Goes on with what comes, as one flow a line (NDJSON), until its reader leaves. A line with `silent` and `lost` instead \
                 says which hosts do not answer and how many flows were lost by now, when either changes.";
    parameters.push(query("follow", json!({"type": "boolean"}), about));
    let mut content = as_body(&body);
    content[NDJSON] = json!({"schema": {"type": "string"}});
    let good = success("What hosts have noted", content, &[]);
    let about = "Who connected to whom in a network and what was dropped, as its `flowLogs` has hosts note it";
    json!({"get": operation("networkFlows", d.plural, about, parameters, answers(vec![("200", good)], &["403", "409"]))})
}

pub(super) fn paths(paths: &mut Map<String, Value>, d: &KindDescriptor) {
    let one = format!("{}/{{name}}", collection_template(d, true));
    match d.plural {
        "nics" => {
            paths.insert(format!("{one}:trace"), trace(d));
            paths.insert(format!("{one}:capture"), capture(d));
        }
        "networks" => {
            paths.insert(format!("{one}:flows"), flows(d));
        }
        "hosts" => {
            paths.insert(format!("{one}:check"), check(d));
        }
        _ => {}
    }
}
