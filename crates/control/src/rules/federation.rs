//! Identity providers and the people that come from them: what a change must keep true.

use nexus_iam::federation::{IssuerUrl, Plaintext, Subject};
use nexus_model::kind::{Departure, DepartureSpec, IdentityProvider, User, UserIdentity};
use nexus_model::{ApiError, Code, FieldError, Name, Object};

use super::people::{check_project, invalid, refuse_many};
use crate::step::Step;

/// The most providers of one organization.
const PROVIDERS: usize = 20;

/// The name of what is remembered of a person. It is 252 bits of a hash: nobody finds two with the same.
pub fn person(issuer: &str, subject: &str) -> Name {
    let key = Subject { issuer: issuer.to_owned(), subject: subject.to_owned() }.key();
    key[..63].parse().expect("63 hexadecimal digits are a name")
}

pub fn check_provider(
    step: &Step<'_>,
    old: Option<&Object<IdentityProvider>>,
    new: &mut Object<IdentityProvider>,
) -> Result<(), ApiError> {
    // A manifest that is kept among others' eyes leaves the secret out.
    if let Some(old) = old.filter(|o| o.spec.issuer == new.spec.issuer && o.spec.client_id == new.spec.client_id) {
        new.spec.sealed_secret = new.spec.sealed_secret.take().or_else(|| old.spec.sealed_secret.clone());
    }
    let organization = new.metadata.organization.as_ref().expect("identity providers belong to an organization");
    let spec = &new.spec;
    if spec.client_secret.is_some() {
        return Err(ApiError::new(Code::Internal, "a client's secret came to the writer as it is"));
    }
    // Whether this machine may be asked is for each server's configuration to say.
    IssuerUrl::parse(&spec.issuer, Plaintext::Loopback).map_err(|e| invalid("spec.issuer", e.to_string()))?;
    if old.is_none() && step.world.identity_providers.within(organization).count() >= PROVIDERS {
        let detail = format!("organization {organization} has {PROVIDERS} identity providers, which is the most");
        return Err(ApiError::new(Code::QuotaExceeded, detail));
    }
    let mut errors = Vec::new();
    for group in spec.groups.values().flatten() {
        // What was deleted since may stay named: it gives nothing.
        let known = old.is_some_and(|o| o.spec.groups.values().any(|ours| ours.contains(group)));
        if !known && step.world.groups.get(Some(organization), group).is_none() {
            errors.push(FieldError::new("spec.groups", format!("there is no group {group}")));
        }
    }
    for (i, rule) in spec.exchange.iter().enumerate() {
        let account = &rule.service_account;
        let known = old.is_some_and(|o| o.spec.exchange.iter().any(|r| r.service_account == *account));
        if !known && step.world.service_accounts.get(Some(organization), account).is_none() {
            let message = format!("there is no service account {account}");
            errors.push(FieldError::new(format!("spec.exchange[{i}].serviceAccount"), message));
        }
        check_project(step, organization, rule.project.as_ref())?;
    }
    errors.truncate(20);
    if errors.is_empty() { Ok(()) } else { Err(ApiError::invalid(errors)) }
}

/// Keeps what a user is at a provider: it is said once, it is nobody else's, and a change that does not speak of it leaves it.
pub fn check_identity(step: &Step<'_>, old: Option<&Object<User>>, new: &mut Object<User>) -> Result<(), ApiError> {
    let before = old.and_then(|o| o.spec.identity.as_ref());
    let Some(asked) = new.spec.identity.take() else {
        new.spec.identity = before.cloned();
        return Ok(());
    };
    let organization = new.metadata.organization.as_ref().expect("users belong to an organization");
    let now = match before {
        Some(before) => kept(before, asked)?,
        None => linked(step, organization, &new.metadata.name, asked)?,
    };
    new.spec.identity = Some(now);
    Ok(())
}

fn kept(before: &UserIdentity, asked: UserIdentity) -> Result<UserIdentity, ApiError> {
    let same = asked.provider == before.provider
        && asked.subject == before.subject
        && (asked.issuer.is_empty() || asked.issuer == before.issuer);
    if !same {
        let message = "can't become another person's: delete the user and make another";
        return Err(invalid("spec.identity", message));
    }
    let groups = asked.groups.or_else(|| before.groups.clone());
    Ok(UserIdentity { groups, ..before.clone() })
}

fn linked(step: &Step<'_>, organization: &Name, user: &Name, asked: UserIdentity) -> Result<UserIdentity, ApiError> {
    let provider = step.world.identity_providers.get(Some(organization), &asked.provider);
    let provider = provider.ok_or_else(|| {
        invalid("spec.identity.provider", format!("there is no identity provider {}", asked.provider))
    })?;
    let issuer = provider.spec.issuer.clone();
    if !asked.issuer.is_empty() && asked.issuer != issuer {
        return Err(invalid("spec.identity.issuer", format!("{} is {issuer}", asked.provider)));
    }
    // Whoever has an account with a public provider could come.
    refuse_many(organization, "users", step.world.users.within(organization).count())?;
    let is_them = |i: &UserIdentity| i.issuer == issuer && i.subject == asked.subject;
    let mut users = step.world.users.within(organization);
    if let Some(taken) = users.find(|u| u.metadata.name != *user && u.spec.identity.as_ref().is_some_and(is_them)) {
        let detail = format!("user {} is this person of {} already", taken.metadata.name, asked.provider);
        return Err(ApiError::new(Code::Conflict, detail));
    }
    Ok(UserIdentity { issuer, ..asked })
}

/// Remembers a person of a provider whose user is deleted: without that, their next sign-in would make it anew.
pub fn depart(step: &mut Step<'_>, user: &Object<User>) {
    let (Some(identity), Some(organization)) = (&user.spec.identity, &user.metadata.organization) else { return };
    let name = person(&identity.issuer, &identity.subject);
    if step.world.departures.get(Some(organization), &name).is_some() {
        return;
    }
    let mut metadata = step.new_metadata(name, None);
    metadata.organization = Some(organization.clone());
    let spec = DepartureSpec {
        issuer: identity.issuer.clone(),
        subject: identity.subject.clone(),
        user: user.metadata.name.to_string(),
        left: Some(step.now),
    };
    step.put(Object::<Departure>::new(metadata, spec));
}
