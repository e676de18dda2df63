//! What is particular to the kinds of tenants' networks: see [`crate::rules::network`].

use nexus_model::kind::*;
use nexus_model::{AnyObject, ApiError, Object};

use super::Admit;
use crate::rules::network::{self, nic};
use crate::step::{Dirty, Step};

impl Admit for Network {
    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        network::admit_network(step, old, new)
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
