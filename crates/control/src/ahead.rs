//! Which images a host fetches before an instance of them is placed there.
//!
//! * **Functions**: every host compiles the region's newest components, since compiling is what takes long.
//! * **Containers**: a host that runs an app gets the image that the app names now, so that a rollout finds it there, and
//!   the newest images that apps name go to a few hosts each, drawn by their hashes: a new app or one that grows starts there
//!   without a download. A host is drawn by itself, so that one more host changes little.
//!
//! It is help and not a promise: whatever is missing is fetched when an instance is started.

use std::collections::BTreeSet;

use nexus_model::kind::{App, Image, ImageFormat, Runtime};
use nexus_model::plan::ImagePlan;
use nexus_model::{Digest, Name, Object};

use crate::world::World;

/// Functions that hosts prepare ahead; of more, the newest.
const FUNCTIONS: usize = 256;
/// The newest images of containers that are looked at …
const NEWEST: usize = 16;
/// … and the hosts that fetch each, more or less.
const HOSTS: u64 = 8;
/// Images of containers that one host prepares ahead.
const CONTAINERS: usize = 32;

/// What a host is to have ready.
pub(crate) fn prepare(world: &World, host: &Name) -> Vec<ImagePlan> {
    let mut images = functions(world);
    images.extend(containers(world, host).into_iter().map(|digest| ImagePlan { format: ImageFormat::Oci, digest }));
    images
}

fn newest(world: &World, format: ImageFormat, most: usize) -> Vec<&Object<Image>> {
    let mut images: Vec<_> = world.fleet().images.live.values().filter(|i| i.spec.format == format).collect();
    images.sort_by_key(|i| (std::cmp::Reverse(i.metadata.created), i.metadata.uid));
    images.truncate(most);
    images
}

fn functions(world: &World) -> Vec<ImagePlan> {
    let images = newest(world, ImageFormat::Wasm, FUNCTIONS);
    images.into_iter().map(|i| ImagePlan { format: ImageFormat::Wasm, digest: i.spec.digest }).collect()
}

/// The content of the images that an app's parts name, if they are containers'.
fn wanted(world: &World, app: &Object<App>) -> Vec<Digest> {
    if app.spec.runtime != Runtime::Container {
        return Vec::new();
    }
    let parts = app.spec.parts();
    let images = std::iter::once(parts.image).chain(parts.other_images());
    let images = images.filter_map(|name| world.fleet().images.get(app.metadata.project.as_ref(), name));
    images.filter(|image| image.spec.format == ImageFormat::Oci).map(|image| image.spec.digest).collect()
}

/// Whether a host is one of those that fetch an image although nothing of its app runs there.
pub(crate) fn is_drawn(hosts: u64, host: &Name, image: Digest) -> bool {
    if hosts <= HOSTS {
        return true;
    }
    let hash = Digest::of(format!("ahead-1\0{host}\0{image}").as_bytes()).hex();
    let first = u64::from_str_radix(&hash[..16], 16).unwrap_or(u64::MAX);
    first < u64::MAX / hosts * HOSTS
}

/// Whether a host takes containers at all now.
fn takes_containers(world: &World, host: &Name) -> bool {
    world.host(host).is_some_and(|h| h.spec.runtimes.contains(&Runtime::Container) && !h.spec.draining)
}

fn containers(world: &World, host: &Name) -> Vec<Digest> {
    if !takes_containers(world, host) {
        return Vec::new();
    }
    let mut here = BTreeSet::new();
    let mut found: BTreeSet<Digest> = BTreeSet::new();
    for instance in world.instances_on(host) {
        here.insert(instance.spec.image_digest);
        here.extend(instance.spec.part_digests.values());
        let app = world.apps.get(instance.metadata.project.as_ref(), &instance.spec.app);
        found.extend(app.into_iter().flat_map(|app| wanted(world, app)));
    }
    let hosts = world.hosts.live.len() as u64;
    for image in newest(world, ImageFormat::Oci, NEWEST) {
        let digest = image.spec.digest;
        if found.contains(&digest) || !is_drawn(hosts, host, digest) {
            continue;
        }
        let Some(project) = &image.metadata.project else { continue };
        let names = |app: &Object<App>| {
            app.spec.runtime == Runtime::Container && app.spec.parts().names_image(&image.metadata.name)
        };
        if world.apps.within(project).any(names) {
            found.insert(digest);
        }
    }
    // What instances here run is fetched for them.
    found.into_iter().filter(|digest| !here.contains(digest)).take(CONTAINERS).collect()
}

/// The hosts, of those that have plans, whose lists change with an app's image.
pub(crate) fn concerned<'a>(
    world: &World,
    app: &Object<App>,
    planned: impl Iterator<Item = &'a Name>,
) -> BTreeSet<Name> {
    let wanted = wanted(world, app);
    if wanted.is_empty() {
        return BTreeSet::new();
    }
    let running: BTreeSet<&Name> =
        world.instances_of(app.metadata.uid).filter_map(|i| i.status.host.as_ref()).collect();
    let hosts = world.hosts.live.len() as u64;
    let drawn = |host: &Name| wanted.iter().any(|digest| is_drawn(hosts, host, *digest));
    planned.filter(|host| running.contains(host) || drawn(host)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use nexus_model::kind::{Host, Instance, Kind};
    use nexus_model::{Metadata, OwnerRef, Timestamp, Uid};

    use super::*;
    use crate::world::{Seat, Stored};

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn object<K: Kind>(text: &str, in_project: bool, number: u8) -> Object<K> {
        let mut metadata = Metadata::new(name(text), in_project.then(|| name("shop")));
        metadata.uid = Uid::from_random([number; 16]);
        metadata.created = Timestamp::from_millis(number.into());
        Object { metadata, spec: K::Spec::default(), status: K::Status::default() }
    }

    fn put<K: Stored>(world: &mut World, object: Object<K>) {
        world.replace(&Seat::of(&object), Some(object));
    }

    fn image(world: &mut World, text: &str, number: u8, content: &[u8]) {
        let mut image = object::<Image>(text, true, number);
        image.spec.digest = Digest::of(content);
        put(world, image);
    }

    /// Twenty hosts; an app of the image `web` on the first.
    fn world() -> World {
        let mut world = World::default();
        for i in 0..20 {
            let mut host = object::<Host>(&format!("host-{i}"), false, 100 + i);
            host.spec.runtimes = vec![Runtime::Container];
            put(&mut world, host);
        }
        image(&mut world, "web", 1, b"old");
        image(&mut world, "unused", 2, b"unused");
        let mut app = object::<App>("app", true, 3);
        app.spec.image = name("web");
        let owner = OwnerRef { kind: "App".to_owned(), name: name("app"), uid: app.metadata.uid };
        put(&mut world, app);
        let mut instance = object::<Instance>("app-1", true, 4);
        (instance.spec.app, instance.spec.image_digest) = (name("app"), Digest::of(b"old"));
        instance.status.host = Some(name("host-0"));
        instance.metadata.owner = Some(owner);
        put(&mut world, instance);
        world
    }

    fn ahead(world: &World, host: &str) -> Vec<Digest> {
        prepare(world, &name(host)).into_iter().map(|image| image.digest).collect()
    }

    #[test]
    fn a_host_fetches_what_its_apps_are_about_to_run() {
        let mut world = world();
        assert_eq!(ahead(&world, "host-0"), [], "what runs is fetched for the instance");
        image(&mut world, "web", 1, b"new");
        assert_eq!(ahead(&world, "host-0"), [Digest::of(b"new")]);
        let others: Vec<String> = (1..20).map(|i| format!("host-{i}")).collect();
        let some = others.iter().filter(|host| ahead(&world, host) == [Digest::of(b"new")]).count();
        let none = others.iter().filter(|host| ahead(&world, host).is_empty()).count();
        assert!(
            some > 0 && none > 0 && some + none == 19,
            "{some} fetch it, {none} nothing, and what no app names nobody"
        );
        let app = world.apps.live.values().next().unwrap();
        let planned: Vec<Name> = (0..20).map(|i| name(&format!("host-{i}"))).collect();
        assert_eq!(concerned(&world, app, planned.iter()).len(), some + 1);
    }

    #[test]
    fn a_host_that_takes_no_containers_fetches_none() {
        let mut world = world();
        image(&mut world, "web", 1, b"new");
        let mut host = world.host(&name("host-0")).unwrap().clone();
        host.spec.draining = true;
        put(&mut world, host.clone());
        assert_eq!(ahead(&world, "host-0"), []);
        (host.spec.draining, host.spec.runtimes) = (false, vec![Runtime::Function]);
        put(&mut world, host);
        assert_eq!(ahead(&world, "host-0"), []);
    }

    #[test]
    fn a_few_hosts_of_many_are_drawn_for_an_image() {
        let image = Digest::of(b"image");
        let name = |i: u32| -> Name { format!("host-{i}").parse().unwrap() };
        assert!((0..8).all(|i| is_drawn(8, &name(i), image)));
        let drawn = |image: Digest| (0..1000).filter(|i| is_drawn(1000, &name(*i), image)).collect::<Vec<_>>();
        // Eight are expected; the chance of none is e^-8, and that of thirty smaller by far.
        assert!((1..30).contains(&drawn(image).len()), "{:?}", drawn(image));
        assert_ne!(drawn(image), drawn(Digest::of(b"another")));
        let grown = (0..1000).filter(|i| is_drawn(1001, &name(*i), image)).collect::<Vec<_>>();
        assert!(grown.iter().all(|host| drawn(image).contains(host)), "who was not drawn is not drawn by one more");
    }
}
