//! The southbound protocol between servers, agents and gateways.
