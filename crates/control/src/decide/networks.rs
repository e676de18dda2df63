//! What is particular to the kinds of tenants' networks: see [`crate::rules::network`].

use nexus_model::kind::*;
use nexus_model::{AnyObject, ApiError, Object};

use super::Admit;
use crate::rules::network::{self, nic, outside, peering, route};
use crate::step::{Dirty, Step};

impl Admit for Network {
    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        network::admit_network(step, old, new)
    }

    fn changed(step: &mut Step<'_>, new: &Object<Self>) {
        network::network_changed(step, new);
    }

    fn may_delete(step: &Step<'_>, old: &Object<Self>) -> Result<(), ApiError> {
        network::may_delete_network(step, old)
    }

    fn delete(step: &mut Step<'_>, old: &Object<Self>) -> AnyObject {
        network::delete_network(step, old)
    }
}

impl Admit for Subnet {
    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        network::admit_subnet(step, old, new)
    }

    fn changed(step: &mut Step<'_>, new: &Object<Self>) {
        network::subnet_changed(step, new);
    }

    fn may_delete(step: &Step<'_>, old: &Object<Self>) -> Result<(), ApiError> {
        network::may_delete_subnet(step, old)
    }
}

impl Admit for SecurityGroup {
    /// The row and the answer that is kept for a retry fit in a transaction together.
    const LARGEST: usize = 256 << 10;

    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        network::admit_group(step, old, new)
    }

    fn changed(step: &mut Step<'_>, new: &Object<Self>) {
        network::group_changed(step, new);
    }

    fn may_delete(step: &Step<'_>, old: &Object<Self>) -> Result<(), ApiError> {
        network::may_delete_group(step, old)
    }
}

impl Admit for Nic {
    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        nic::admit(step, old, new)
    }

    fn changed(step: &mut Step<'_>, new: &Object<Self>) {
        step.mark(Dirty::Nic(new.metadata.uid));
    }

    fn may_delete(step: &Step<'_>, old: &Object<Self>) -> Result<(), ApiError> {
        nic::may_delete(step, old)
    }

    fn delete(step: &mut Step<'_>, old: &Object<Self>) -> AnyObject {
        nic::delete(step, old)
    }
}

impl Admit for PrefixList {
    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        network::admit_prefix_list(step, old, new)
    }

    fn may_delete(step: &Step<'_>, old: &Object<Self>) -> Result<(), ApiError> {
        network::may_delete_prefix_list(step, old)
    }
}

impl Admit for RouteTable {
    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        route::admit(step, old, new)
    }

    fn may_delete(step: &Step<'_>, old: &Object<Self>) -> Result<(), ApiError> {
        route::may_delete(step, old)
    }
}

impl Admit for Peering {
    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        peering::admit(step, old, new)
    }

    fn changed(step: &mut Step<'_>, new: &Object<Self>) {
        peering::mark_both(step, new);
    }

    fn may_delete(step: &Step<'_>, old: &Object<Self>) -> Result<(), ApiError> {
        peering::may_delete(step, old)
    }

    fn delete(step: &mut Step<'_>, old: &Object<Self>) -> AnyObject {
        peering::mark_both(step, old);
        super::erased(step, old)
    }
}

impl Admit for InternetGateway {
    fn admit(step: &mut Step<'_>, _: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        outside::admit_internet_gateway(step, new)
    }

    fn may_delete(step: &Step<'_>, old: &Object<Self>) -> Result<(), ApiError> {
        outside::may_delete_internet_gateway(step, old)
    }
}

impl Admit for NatGateway {
    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        outside::admit_nat(step, old, new)
    }

    fn may_delete(step: &Step<'_>, old: &Object<Self>) -> Result<(), ApiError> {
        outside::may_delete_nat(step, old)
    }
}

impl Admit for AddressPool {
    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        outside::admit_pool(step, old, new)
    }

    fn may_delete(step: &Step<'_>, old: &Object<Self>) -> Result<(), ApiError> {
        outside::may_delete_pool(step, old)
    }
}

impl Admit for FloatingIp {
    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        outside::admit_floating(step, old, new)
    }

    fn delete(step: &mut Step<'_>, old: &Object<Self>) -> AnyObject {
        outside::delete_floating(step, old)
    }
}

impl Admit for LoadBalancer {
    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        outside::admit_balancer(step, old, new)
    }

    fn delete(step: &mut Step<'_>, old: &Object<Self>) -> AnyObject {
        outside::delete_balancer(step, old)
    }
}

impl Admit for DnsZone {
    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        outside::admit_zone(step, old, new)
    }
}
