//! Plans of what goes along with what uses a network, and in which order.

use super::*;

fn object(plural: &'static str, text: &str, spec: Value) -> (&'static str, Value) {
    (plural, json!({"metadata": {"name": text, "revision": 7}, "spec": spec}))
}

fn found(objects: Vec<(&'static str, Value)>) -> Found {
    let mut found = Found::new();
    for (plural, object) in objects {
        found.entry(plural).or_default().push(object);
    }
    found
}

/// A network with all that may lie in it, and NICs of which one is an app's.
fn shop() -> Vec<(&'static str, Value)> {
    let at = |network: &str| json!({ "network": network });
    let mut made = object("nics", "web-1-nic0", json!({"subnet": "front", "securityGroups": ["web"]}));
    made.1["metadata"]["owner"] = json!({"kind": "Instance", "name": "web-1"});
    let mut door = object("nics", "door", json!({"subnet": "front", "securityGroups": ["web", "admin"]}));
    door.1["status"] = json!({"network": {"name": "shop"}});
    let to = |to: &str, via: Value| json!({"to": to, "via": via});
    let routes = vec![
        to("0.0.0.0/0", json!("internet")),
        to("10.9.0.0/16", json!({"peering": "to-data"})),
        to("10.8.0.0/16", json!({"nic": "door"})),
        to("10.7.0.0/16", json!({"nat": "nat"})),
        to("10.6.0.0/16", json!("blackhole")),
    ];
    let rule = |id: &str, remotes: Value| json!({"id": id, "direction": "ingress", "remotes": remotes});
    let rules = vec![
        rule("all", json!([])),
        rule("admins", json!([{"group": "admin"}])),
        rule("both", json!([{"group": "admin"}, {"cidr": "10.0.0.0/8"}])),
        rule("listed", json!([{"prefixList": "offices"}])),
    ];
    let target = |to: Value| json!({ "to": to });
    let targets = vec![target(json!({"app": "web"})), target(json!({"nic": "door"}))];
    vec![
        object("networks", "shop", json!({})),
        object("subnets", "front", json!({"network": "shop", "routeTable": "out"})),
        object("route-tables", "out", json!({"network": "shop", "routes": routes})),
        object("security-groups", "web", json!({"network": "shop", "rules": rules})),
        object(
            "security-groups",
            "admin",
            json!({"network": "shop", "rules": [rule("own", json!([{"group": "admin"}]))]}),
        ),
        object("prefix-lists", "offices", json!({})),
        object("peerings", "to-data", at("shop")),
        object("nat-gateways", "nat", at("shop")),
        object("internet-gateways", "igw", at("shop")),
        object("dns-zones", "zone", at("shop")),
        object("load-balancers", "lb", json!({"subnet": "front", "listeners": [{"port": 80, "targets": targets}]})),
        object("floating-ips", "public", json!({"pool": "p", "nic": "door"})),
        door,
        made,
        object("instances", "web-1", json!({"app": "web"})),
        object("apps", "web", json!({"nics": [{"subnet": "front", "securityGroups": ["web"]}]})),
        object("apps", "other", json!({})),
        object("subnets", "elsewhere", json!({"network": "data"})),
        object("nics", "elsewhere", json!({"subnet": "elsewhere"})),
    ]
}

fn plan(asked: &[(&'static str, &str)], found: &Found) -> Plan {
    let ids: Vec<Id> = asked.iter().map(|(plural, text)| (*plural, text.parse().unwrap())).collect();
    Plan::make(&ids, found)
}

fn deleted(plan: &Plan) -> Vec<String> {
    plan.steps.iter().filter(|(_, act)| *act == Act::Delete).map(|(id, _)| title(id)).collect()
}

fn changed<'a>(plan: &'a Plan, plural: &str) -> Vec<(&'a Name, &'a Value)> {
    let of = plan.steps.iter().filter(|((p, _), _)| *p == plural);
    of.filter_map(|((_, name), act)| match act {
        Act::Change { patch, revision: 7, .. } => Some((name, &patch["spec"])),
        _ => None,
    })
    .collect()
}

#[test]
fn a_network_takes_all_of_its_own_along_and_apps_only_if_they_are_named() {
    let found = found(shop());
    let refused = plan(&[("networks", "shop")], &found).refused().unwrap().message;
    assert!(refused.contains("app/web has NICs by subnet/front") && !refused.contains("instance"), "{refused}");
    let plan = plan(&[("networks", "shop"), ("apps", "web")], &found);
    assert!(plan.refused().is_none(), "{:?}", plan.refusals);
    let order = [
        "app/web",
        "loadbalancer/lb",
        "dnszone/zone",
        "nic/door",
        "subnet/front",
        "securitygroup/admin",
        "securitygroup/web",
        "routetable/out",
        "peering/to-data",
        "natgateway/nat",
        "internetgateway/igw",
        "network/shop",
    ];
    assert_eq!(deleted(&plan), order, "each behind what uses it");
    // What would keep them from going is let go before: bindings, ways, and groups that name each other.
    assert_eq!(changed(&plan, "floating-ips"), [(&"public".parse().unwrap(), &json!({"nic": null}))]);
    assert_eq!(changed(&plan, "route-tables")[0].1["routes"].as_array().unwrap().len(), 1);
    assert_eq!(changed(&plan, "security-groups").len(), 1);
    let first_delete = plan.steps.iter().position(|(id, _)| id.0 == "load-balancers").unwrap();
    let unbound = plan.steps.iter().position(|(id, _)| id.0 == "floating-ips").unwrap();
    assert!(unbound < first_delete && plan.text().contains("change  floatingip/public: leads nowhere any more"));
}

#[test]
fn a_group_goes_without_opening_anything() {
    let found = found(shop());
    let plan_admin = plan(&[("security-groups", "admin")], &found);
    assert!(plan_admin.refused().is_none());
    assert_eq!(changed(&plan_admin, "nics"), [(&"door".parse().unwrap(), &json!({"securityGroups": ["web"]}))]);
    let rules = changed(&plan_admin, "security-groups")[0].1["rules"].as_array().unwrap().clone();
    let ids: Vec<&str> = rules.iter().map(|rule| rule["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["all", "both", "listed"], "a rule about nobody else goes: without remotes it is about everybody");
    assert_eq!(rules[1]["remotes"], json!([{"cidr": "10.0.0.0/8"}]));
    let listed = plan(&[("prefix-lists", "offices")], &found);
    assert_eq!(changed(&listed, "security-groups")[0].1["rules"].as_array().unwrap().len(), 3);
    assert_eq!(deleted(&listed), ["prefixlist/offices"]);

    let mut objects = shop();
    objects.push(object("nics", "lone", json!({"subnet": "front", "securityGroups": ["admin"]})));
    let refused = plan(&[("security-groups", "admin")], &self::found(objects)).refused().unwrap().message;
    assert!(refused.contains("nic/lone would be without a group"), "{refused}");
}

#[test]
fn what_names_a_part_loses_that_and_no_more() {
    let found = found(shop());
    let nic = plan(&[("nics", "door")], &found);
    assert_eq!(deleted(&nic), ["nic/door"]);
    assert_eq!(changed(&nic, "route-tables")[0].1["routes"].as_array().unwrap().len(), 4);
    let targets = &changed(&nic, "load-balancers")[0].1["listeners"][0]["targets"];
    assert_eq!(*targets, json!([{"to": {"app": "web"}}]));
    let table = plan(&[("route-tables", "out")], &found);
    assert_eq!(changed(&table, "subnets"), [(&"front".parse().unwrap(), &json!({"routeTable": null}))]);
    let gateway = plan(&[("internet-gateways", "igw")], &found);
    assert_eq!((changed(&gateway, "floating-ips").len(), changed(&gateway, "route-tables").len()), (1, 1));
    let zone = plan(&[("dns-zones", "zone")], &found);
    assert_eq!(zone.steps.len(), 1, "of what nothing uses, nothing is asked");
}

#[test]
fn what_is_protected_or_still_has_instances_is_in_the_way() {
    let mut objects = shop();
    objects.retain(|(plural, o)| *plural != "apps" || o["metadata"]["name"] != "web");
    objects.push(object("apps", "web", json!({"nics": []})));
    objects
        .iter_mut()
        .filter(|(p, _)| *p == "dns-zones")
        .for_each(|(_, o)| o["metadata"]["deletionProtection"] = true.into());
    let refused = plan(&[("networks", "shop")], &found(objects)).refused().unwrap().message;
    assert!(refused.contains("dnszone/zone is protected from deletion"), "{refused}");
    assert!(
        refused.contains("instance/web-1 has nic/web-1-nic0 by subnet/front"),
        "of an app that has changed: {refused}"
    );
}
