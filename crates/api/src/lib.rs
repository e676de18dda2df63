//! REST, OpenAPI and watches over the kinds.
