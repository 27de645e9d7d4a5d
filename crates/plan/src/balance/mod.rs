//! Balance: the members of services and the holders of their addresses.

mod blue_green;
mod canary;
pub mod frontends;
mod member;
mod rolling;
mod rollout;
pub mod services;
