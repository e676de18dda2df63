//! The control plane of a region: one writer that takes intents in order, decides them against its own state and commits
//! them in batches; the reconcilers, cells and quotas are functions over that state.
//!
//! * [`region`]: the loop that leads, and the door to it from any server.
//! * [`fleet`]: what a region takes in from the group that all regions share, and what it tells it.
//! * [`core`]: the loop's inside, free of I/O. [`decide`] rules on what users ask; [`rules`] are the reconcilers;
//!   [`cells`] judges hosts; [`scheduler`] chooses cells and hosts.
//! * [`world`]: the region's state as typed tables; [`step`]: one decision over it, all or nothing.
//! * [`autoscale`]: how many instances an app has, where the cloud is to decide that.
//! * [`traffic`]: what gateways say of requests, in memory.
//! * [`balance`]: which targets of load balancers fail, by what hosts say.
//! * [`surroundings`]: what an app's constraints mean in a world; [`latency`]: how far hosts are from gateways.
//! * `numa`: what is taken of hosts' NUMA nodes, recounted.
//! * [`secrets`]: the sealed values that the writer passes on unseen.
//! * [`outbox`]: what is told to others' servers.
//! * [`audit`]: the record that every accepted change leaves.
//! * [`view`]: what the committed state means for hosts and gateways; [`directory`]: what it means for who may do what.
//!
//! Architecture invariant: nothing here starts a process, touches a link or opens a socket.

mod ahead;
pub mod audit;
pub mod autoscale;
pub mod balance;
pub mod cells;
mod chain;
pub mod core;
pub mod decide;
pub mod directory;
pub mod fleet;
mod inbox;
pub mod intent;
pub mod latency;
mod link;
pub mod nets;
mod numa;
mod outbox;
pub mod region;
pub mod rules;
pub mod scheduler;
pub mod secrets;
pub mod shard;
pub mod step;
pub mod surroundings;
pub mod traffic;
pub mod view;
pub mod world;
