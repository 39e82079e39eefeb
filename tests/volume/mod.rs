//! Volumes: their contents, their promises when the power, the process or the disk fails, and what they refuse.

mod begun;
mod disk;
mod exclusion;
mod faults;
mod history;
mod machine;
mod model;
mod open;
mod overlap;
mod power_loss;
mod process_death;
mod stamps;
