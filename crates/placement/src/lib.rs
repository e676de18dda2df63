//! Feasibility and scoring over a cell's hosts: pure, deterministic, fast.
