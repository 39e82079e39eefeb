//! Both neighbours of a keeper, for the target `session`: [`backend`] starts one in this process and is its controller, [`front_end`] speaks with
//! it, [`guest`] has memory and rings in it, and [`disk`] knows what may be read.

pub mod backend;
pub mod disk;
pub mod front_end;
pub mod guest;
