//! Compiling a component: a process of its own, because a compiler that is fed a stranger's bytes must have nothing to
//! lose. The component comes on standard input, the artefact leaves on standard output.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;

use wasmtime::component::Component;

use super::engine::{self, Program, Purpose, Unfit};

/// The exit status when the component is at fault; standard error says how. Any other failure is the host's.
pub(super) const UNFIT: u8 = 3;

/// A larger component is refused.
pub(super) const MAX_COMPONENT: u64 = 256 << 20;

#[derive(Debug, thiserror::Error)]
pub(super) enum CompileError {
    #[error("it is not WebAssembly: it does not begin with \\0asm")]
    NotWasm,
    #[error(
        "it is a core module, not a component: build it for the target wasm32-wasip2, or wrap it by `wasm-tools component new`"
    )]
    CoreModule,
    #[error("it is {0} bytes or more; {MAX_COMPONENT} are allowed")]
    TooLarge(u64),
    #[error("it is not valid: {0}")]
    Invalid(String),
    #[error(transparent)]
    Unfit(#[from] Unfit),
    #[error("compiling: {0}")]
    Io(#[from] std::io::Error),
    #[error("the engine: {0:#}")]
    Engine(wasmtime::Error),
}

impl CompileError {
    pub(super) fn is_the_components(&self) -> bool {
        !matches!(self, Self::Io(_) | Self::Engine(_))
    }
}

/// Refuses what is no component by its first bytes, in words for people who took the wrong file.
fn sniff(bytes: &[u8]) -> Result<(), CompileError> {
    match bytes {
        [0, b'a', b's', b'm', 1, 0, 0, 0, ..] => Err(CompileError::CoreModule),
        [0, b'a', b's', b'm', ..] => Ok(()),
        _ => Err(CompileError::NotWasm),
    }
}

/// The machine code of a component, once it is sure that it can be served.
pub(super) fn compile(bytes: &[u8]) -> Result<Vec<u8>, CompileError> {
    sniff(bytes)?;
    let engine = engine::engine(Purpose::Compile).map_err(CompileError::Engine)?;
    // Its message has the offset, its causes the reason; both are one line.
    let component =
        Component::new(&engine, bytes).map_err(|e| CompileError::Invalid(format!("{e:#}").replace('\n', " ")))?;
    let linker = engine::linker(&engine).map_err(CompileError::Engine)?;
    Program::new(&linker, &component)?;
    component.serialize().map_err(CompileError::Engine)
}

/// The body of `executor compile`, after the process has confined itself.
pub(super) fn compile_stdio() -> Result<(), CompileError> {
    // Not by `std::io::stdout`, which would cut at newlines.
    let input = File::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut output = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    let mut bytes = Vec::new();
    input.take(MAX_COMPONENT + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_COMPONENT {
        return Err(CompileError::TooLarge(bytes.len() as u64));
    }
    output.write_all(&compile(&bytes)?)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_component_is_told_apart() {
        assert!(matches!(compile(b"#!/bin/sh"), Err(CompileError::NotWasm)));
        assert!(matches!(compile(b""), Err(CompileError::NotWasm)));
        assert!(matches!(compile(b"\0asm\x01\0\0\0"), Err(CompileError::CoreModule)));
        assert!(matches!(compile(b"\0asm\x0d\0\x01\0\xff\xff\xff"), Err(CompileError::Invalid(_))));
        let empty = compile(b"\0asm\x0d\0\x01\0").unwrap_err();
        assert!(matches!(&empty, CompileError::Unfit(Unfit::NoHandler(names)) if names == "nothing"), "{empty}");
        assert!(empty.is_the_components());
    }
}
