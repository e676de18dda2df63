//! Who an image wants its command to run as: `USER`, `UID`, `USER:GROUP` …, by the image's own `/etc/passwd` and
//! `/etc/group`.

/// Bounds supplementary groups; the kernel's own bound is 65,536.
const MAX_GROUPS: usize = 1024;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct User {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: Option<String>,
}

/// Finds a user. Numbers need not be listed; names must. Nobody named means root.
pub(super) fn resolve(wanted: &str, passwd: &str, group: &str) -> Result<User, String> {
    let (user, wanted_group) = match wanted.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (wanted, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number: Option<u32> = user.parse().ok();
    // name:password:uid:gid:comment:home:shell
    let entry = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.len() >= 4 && (fields[0] == user || number.is_some_and(|n| fields[2].parse() == Ok(n))));
    let field = |i: usize| entry.as_ref().and_then(|fields| fields.get(i)).and_then(|f| f.parse::<u32>().ok());
    let uid = field(2).or(number).ok_or_else(|| format!("the image's /etc/passwd has no user {user:?}"))?;
    let home = entry.as_ref().and_then(|f| f.get(5)).filter(|h| h.starts_with('/')).map(|h| (*h).to_owned());

    // name:password:gid:members
    let groups = || group.lines().map(|line| line.split(':').collect::<Vec<_>>()).filter(|fields| fields.len() >= 3);
    if let Some(wanted) = wanted_group.filter(|g| !g.is_empty()) {
        let found = groups().find(|f| f[0] == wanted).and_then(|f| f[2].parse().ok());
        let gid = found.or_else(|| wanted.parse().ok());
        let gid = gid.ok_or_else(|| format!("the image's /etc/group has no group {wanted:?}"))?;
        return Ok(User { uid, gid, groups: Vec::new(), home });
    }
    let gid = field(3).unwrap_or(0);
    let name = entry.as_ref().map(|f| f[0]);
    let member = |f: &Vec<&str>| f.get(3).is_some_and(|list| list.split(',').any(|m| Some(m) == name && !m.is_empty()));
    let extra = groups().filter(member).filter_map(|f| f[2].parse().ok()).filter(|g| *g != gid);
    Ok(User { uid, gid, groups: extra.take(MAX_GROUPS).collect(), home })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:44:web:/var/www:/bin/false\nbroken\n";
    const GROUP: &str = "root:x:0:\nweb:x:44:\nlogs:x:50:web,root\nother:x:51:someone\n";

    #[test]
    fn users_are_found_by_name_and_number() {
        let web = User { uid: 33, gid: 44, groups: vec![50], home: Some("/var/www".into()) };
        assert_eq!(resolve("web", PASSWD, GROUP), Ok(web.clone()));
        assert_eq!(resolve("33", PASSWD, GROUP), Ok(web));
        let root = User { uid: 0, gid: 0, groups: vec![50], home: Some("/root".into()) };
        assert_eq!(resolve("", PASSWD, GROUP), Ok(root));
        assert_eq!(resolve("1000", PASSWD, GROUP), Ok(User { uid: 1000, gid: 0, groups: vec![], home: None }));
        assert_eq!(resolve("", "", ""), Ok(User { uid: 0, gid: 0, groups: vec![], home: None }));
    }

    #[test]
    fn a_named_group_replaces_the_others() {
        assert_eq!(resolve("web:logs", PASSWD, GROUP).unwrap().gid, 50);
        assert_eq!(resolve("1:2", PASSWD, GROUP), Ok(User { uid: 1, gid: 2, groups: vec![], home: None }));
        assert!(resolve("nobody", PASSWD, GROUP).unwrap_err().contains("nobody"));
        assert!(resolve("web:none", PASSWD, GROUP).unwrap_err().contains("none"));
    }
}
