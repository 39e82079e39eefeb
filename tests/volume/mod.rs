//! Volumes: their contents, their promises when the power, the process or the disk fails, and what they refuse.

mod disk;
mod history;
mod machine;
mod power_loss;
mod process_death;
mod stamps;
