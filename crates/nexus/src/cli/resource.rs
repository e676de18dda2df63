//! What a command is about: `KIND NAME…` or `KIND/NAME…`, in any case, long or short, with advice for a misspelt kind.

use nexus_model::Name;
use nexus_model::kind::{self, KindDescriptor};

use crate::exit::Fail;

/// A kind and the names that were asked for; none means all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    pub plural: &'static str,
    pub names: Vec<Name>,
}

impl Asked {
    pub fn kind(&self) -> &'static KindDescriptor {
        kind::find(self.plural).expect("made from a kind")
    }
}

/// The kind that a word names.
pub fn find_kind(word: &str) -> Result<&'static KindDescriptor, Fail> {
    kind::find(word).ok_or_else(|| {
        let lower = word.to_lowercase();
        let words = kind::all().iter().flat_map(|d| {
            let kind = d.kind.to_lowercase();
            [kind, d.plural.to_owned()].into_iter().chain(d.short.iter().map(|s| (*s).to_owned()))
        });
        let near = words.map(|w| (strsim::damerau_levenshtein(&w, &lower), w)).min();
        // A word of three letters is near to everything.
        let advice = match near {
            Some((distance, near)) if distance <= (lower.len() / 2).min(3) => format!("did you mean {near:?}?"),
            _ => {
                let all: Vec<_> = kind::all().iter().map(|d| d.plural).collect();
                format!("there are: {}", all.join(", "))
            }
        };
        let shown: String = word.chars().take(64).collect();
        Fail::usage(format!("there is no kind {shown:?}; {advice}"))
    })
}

/// An object's name. One that no object can have is not found rather than malformed: the reader wants to know that it
/// isn't there.
pub fn find_name(kind: &KindDescriptor, text: &str) -> Result<Name, Fail> {
    text.parse().map_err(|e| {
        let shown: String = text.chars().take(64).collect();
        Fail::not_found(format!("there is no {} {shown:?}: {e}", kind.kind))
    })
}

/// The name of something that is to be made.
pub fn new_name(text: &str) -> Result<Name, String> {
    text.parse().map_err(|e: nexus_model::name::NameError| e.to_string())
}

/// Reads `KIND NAME…` or `KIND/NAME…`; kinds keep their first place.
pub fn parse(words: &[String]) -> Result<Vec<Asked>, Fail> {
    let Some(first) = words.first() else {
        return Err(Fail::usage("name a kind, such as `apps`, or an object, such as app/web"));
    };
    if !first.contains('/') {
        let mut asked = Vec::new();
        for word in first.split(',').filter(|w| !w.is_empty()) {
            let kind = find_kind(word)?;
            let mut names = Vec::new();
            for text in &words[1..] {
                if text.contains('/') {
                    return Err(Fail::usage(format!(
                        "{text:?}: after a kind come names only; or write KIND/NAME each"
                    )));
                }
                names.push(find_name(kind, text)?);
            }
            add(&mut asked, kind, names);
        }
        return Ok(asked);
    }
    let mut asked = Vec::new();
    for word in words {
        let Some((kind, name)) = word.split_once('/') else {
            return Err(Fail::usage(format!("{word:?}: write KIND/NAME for each, or KIND once and then names")));
        };
        let kind = find_kind(kind)?;
        let name = find_name(kind, name)?;
        add(&mut asked, kind, vec![name]);
    }
    Ok(asked)
}

fn add(asked: &mut Vec<Asked>, kind: &'static KindDescriptor, names: Vec<Name>) {
    match asked.iter_mut().find(|a| a.plural == kind.plural) {
        Some(same) => same.names.extend(names),
        None => asked.push(Asked { plural: kind.plural, names }),
    }
}

/// `app/web`, as commands report what they did.
pub fn title(kind: &KindDescriptor, name: &str) -> String {
    format!("{}/{name}", kind.kind.to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: &[&str]) -> Result<Vec<(&'static str, Vec<String>)>, String> {
        let words: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
        let asked = parse(&words).map_err(|e| e.message)?;
        Ok(asked.into_iter().map(|a| (a.plural, a.names.iter().map(Name::to_string).collect())).collect())
    }

    #[test]
    fn both_forms_name_the_same() {
        let web = vec![("apps", vec!["web".to_owned(), "api".to_owned()])];
        assert_eq!(read(&["App", "web", "api"]).unwrap(), web);
        assert_eq!(read(&["apps/web", "APP/api"]).unwrap(), web);
        assert_eq!(read(&["inst"]).unwrap(), [("instances", vec![])]);
        assert_eq!(read(&["apps,events"]).unwrap().len(), 2);
        assert!(read(&["apps", "app/web"]).is_err() && read(&["app/web", "api"]).is_err() && read(&[]).is_err());
    }

    #[test]
    fn a_misspelt_kind_is_recognised() {
        assert!(read(&["isntances"]).unwrap_err().contains("\"instances\""));
        assert!(read(&["porject"]).unwrap_err().contains("\"project\""));
        assert!(read(&["kubernetes"]).unwrap_err().contains("organizations, projects"));
        assert!(read(&["app", "Web"]).unwrap_err().contains("there is no App \"Web\""));
    }
}
