//! The gateway: routing and balancing of requests.
