//! The handlers, and which path each is at.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::daemon::Host;
use crate::daemon::access::Caller;

use super::extract::{Asked, At, Input};
use super::problem::Failure;
use super::stream;
use super::types::*;
use super::{Answer, call, run};

type Shared = State<Arc<Host>>;

/// All of them.
pub fn all() -> OpenApiRouter<Arc<Host>> {
    OpenApiRouter::new()
        .routes(routes!(status))
        .routes(routes!(list_images, import_image))
        .routes(routes!(show_image, remove_image))
        .routes(routes!(verify_image))
        .routes(routes!(list_channels))
        .routes(routes!(show_channel, set_channel, remove_channel))
        .routes(routes!(channel_history))
        .routes(routes!(roll_channel_back))
        .routes(routes!(list_volumes, create_volume))
        .routes(routes!(show_volume, remove_volume))
        .routes(routes!(reset_volume))
        .routes(routes!(rebuild_volume))
        .routes(routes!(grow_volume))
        .routes(routes!(list_attachments, attach))
        .routes(routes!(show_attachment, detach))
        .routes(routes!(resume))
        .routes(routes!(list_vms))
        .routes(routes!(upgrade))
        .routes(routes!(list_deployments, deploy))
        .routes(routes!(show_deployment))
        .routes(routes!(abort_deployment))
        .routes(routes!(roll_deployment_back))
        .routes(routes!(list_groups))
        .routes(routes!(put_group, show_group, remove_group))
        .routes(routes!(add_member))
        .routes(routes!(remove_member))
        .routes(routes!(add_grant, remove_grant))
        .routes(routes!(audit))
        .routes(routes!(list_jobs))
        .routes(routes!(cancel_job, show_job))
        .routes(routes!(load))
        .routes(routes!(stream::upload_image))
        .routes(routes!(stream::image_content))
        .routes(routes!(stream::events))
}

/// The daemon itself.
#[utoipa::path(get, path = "/v1/status", responses((status = 200, description = "The daemon itself", body = Status)))]
async fn status(State(host): Shared, caller: Caller) -> Answer<Status> {
    call(host, caller, move |host, caller| {
        let _ = caller;
        host.status()
    })
    .await
}

/// The images that the caller may see.
#[utoipa::path(get, path = "/v1/images", responses((status = 200, description = "The images that the caller may see", body = Vec<Image>)))]
async fn list_images(State(host): Shared, caller: Caller) -> Answer<Vec<Image>> {
    call(host, caller, move |host, caller| host.list_images(caller)).await
}

/// Imports a file of this host.
#[utoipa::path(post, path = "/v1/images", request_body = ImportRequest, responses((status = 202, description = "Imports a file of this host", body = Job)))]
async fn import_image(
    State(host): Shared,
    caller: Caller,
    Input(request): Input<ImportRequest>,
) -> Result<(StatusCode, Json<Job>), Failure> {
    run(host, caller, move |host, caller| host.import_path(caller, &request))
        .await
        .map(|made| (StatusCode::ACCEPTED, Json(made)))
}

/// One image.
#[utoipa::path(get, path = "/v1/images/{image}", params(("image" = String, Path, description = "A version, a digest or its first digits")), responses((status = 200, description = "One image", body = Image)))]
async fn show_image(State(host): Shared, caller: Caller, At(image): At<String>) -> Answer<Image> {
    call(host, caller, move |host, caller| host.show_image(caller, &image)).await
}

/// Removes an image that nothing uses.
#[utoipa::path(delete, path = "/v1/images/{image}", params(("image" = String, Path, description = "A version, a digest or its first digits")), responses((status = 204, description = "Removes an image that nothing uses")))]
async fn remove_image(State(host): Shared, caller: Caller, At(image): At<String>) -> Result<StatusCode, Failure> {
    run(host, caller, move |host, caller| host.remove_image(caller, &image)).await.map(|()| StatusCode::NO_CONTENT)
}

/// Reads all of an image and sees that it is what it was.
#[utoipa::path(post, path = "/v1/images/{image}/verify", params(("image" = String, Path, description = "A version, a digest or its first digits")), responses((status = 202, description = "Reads all of an image and sees that it is what it was", body = Job)))]
async fn verify_image(
    State(host): Shared,
    caller: Caller,
    At(image): At<String>,
) -> Result<(StatusCode, Json<Job>), Failure> {
    run(host, caller, move |host, caller| host.verify_image(caller, &image))
        .await
        .map(|made| (StatusCode::ACCEPTED, Json(made)))
}

/// The channels that the caller may see.
#[utoipa::path(get, path = "/v1/channels", responses((status = 200, description = "The channels that the caller may see", body = Vec<Channel>)))]
async fn list_channels(State(host): Shared, caller: Caller) -> Answer<Vec<Channel>> {
    call(host, caller, move |host, caller| host.list_channels(caller)).await
}

/// One channel.
#[utoipa::path(get, path = "/v1/channels/{name}", params(("name" = String, Path, description = "The channel; a slash in it is written %2F")), responses((status = 200, description = "One channel", body = Channel)))]
async fn show_channel(State(host): Shared, caller: Caller, At(name): At<String>) -> Answer<Channel> {
    call(host, caller, move |host, caller| host.show_channel(caller, &name)).await
}

/// Points a channel to an image.
#[utoipa::path(put, path = "/v1/channels/{name}", params(("name" = String, Path, description = "The channel; a slash in it is written %2F")), request_body = ChannelRequest, responses((status = 200, description = "Points a channel to an image", body = Channel)))]
async fn set_channel(
    State(host): Shared,
    caller: Caller,
    At(name): At<String>,
    Input(request): Input<ChannelRequest>,
) -> Answer<Channel> {
    call(host, caller, move |host, caller| host.set_channel(caller, &name, &request.image)).await
}

/// Removes a channel that no volume follows.
#[utoipa::path(delete, path = "/v1/channels/{name}", params(("name" = String, Path, description = "The channel; a slash in it is written %2F")), responses((status = 204, description = "Removes a channel that no volume follows")))]
async fn remove_channel(State(host): Shared, caller: Caller, At(name): At<String>) -> Result<StatusCode, Failure> {
    run(host, caller, move |host, caller| host.remove_channel(caller, &name)).await.map(|()| StatusCode::NO_CONTENT)
}

/// The moves of a channel, the newest first.
#[utoipa::path(get, path = "/v1/channels/{name}/history", params(("name" = String, Path, description = "The channel; a slash in it is written %2F")), responses((status = 200, description = "The moves of a channel, the newest first", body = Vec<ChannelMove>)))]
async fn channel_history(State(host): Shared, caller: Caller, At(name): At<String>) -> Answer<Vec<ChannelMove>> {
    call(host, caller, move |host, caller| host.channel_history(caller, &name)).await
}

/// Points a channel to where it pointed before.
#[utoipa::path(post, path = "/v1/channels/{name}/rollback", params(("name" = String, Path, description = "The channel; a slash in it is written %2F")), responses((status = 200, description = "Points a channel to where it pointed before", body = Channel)))]
async fn roll_channel_back(State(host): Shared, caller: Caller, At(name): At<String>) -> Answer<Channel> {
    call(host, caller, move |host, caller| host.roll_channel_back(caller, &name)).await
}

/// The volumes that the caller may see.
#[utoipa::path(get, path = "/v1/volumes", responses((status = 200, description = "The volumes that the caller may see", body = Vec<Volume>)))]
async fn list_volumes(State(host): Shared, caller: Caller) -> Answer<Vec<Volume>> {
    call(host, caller, move |host, caller| host.list_volumes(caller)).await
}

/// Creates a volume.
#[utoipa::path(post, path = "/v1/volumes", request_body = VolumeRequest, responses((status = 201, description = "Creates a volume", body = Volume)))]
async fn create_volume(
    State(host): Shared,
    caller: Caller,
    Input(request): Input<VolumeRequest>,
) -> Result<(StatusCode, Json<Volume>), Failure> {
    run(host, caller, move |host, caller| host.create_volume(caller, &request))
        .await
        .map(|made| (StatusCode::CREATED, Json(made)))
}

/// One volume.
#[utoipa::path(get, path = "/v1/volumes/{name}", params(("name" = String, Path, description = "The volume")), responses((status = 200, description = "One volume", body = Volume)))]
async fn show_volume(State(host): Shared, caller: Caller, At(name): At<String>) -> Answer<Volume> {
    call(host, caller, move |host, caller| host.show_volume(caller, &name)).await
}

/// Removes a volume and what is in it.
#[utoipa::path(delete, path = "/v1/volumes/{name}", params(("name" = String, Path, description = "The volume")), responses((status = 204, description = "Removes a volume and what is in it")))]
async fn remove_volume(State(host): Shared, caller: Caller, At(name): At<String>) -> Result<StatusCode, Failure> {
    run(host, caller, move |host, caller| host.remove_volume(caller, &name)).await.map(|()| StatusCode::NO_CONTENT)
}

/// Gives a volume a fresh delta on the image that it is on.
#[utoipa::path(post, path = "/v1/volumes/{name}/reset", params(("name" = String, Path, description = "The volume")), responses((status = 200, description = "Gives a volume a fresh delta on the image that it is on", body = Volume)))]
async fn reset_volume(State(host): Shared, caller: Caller, At(name): At<String>) -> Answer<Volume> {
    call(host, caller, move |host, caller| host.reset_volume(caller, &name)).await
}

/// Gives a volume a fresh delta on the image that it is to be on.
#[utoipa::path(post, path = "/v1/volumes/{name}/rebuild", params(("name" = String, Path, description = "The volume")), responses((status = 200, description = "Gives a volume a fresh delta on the image that it is to be on", body = Volume)))]
async fn rebuild_volume(State(host): Shared, caller: Caller, At(name): At<String>) -> Answer<Volume> {
    call(host, caller, move |host, caller| host.rebuild_volume(caller, &name)).await
}

/// Makes a volume larger; a guest that runs from it is told.
#[utoipa::path(post, path = "/v1/volumes/{name}/grow", params(("name" = String, Path, description = "The volume")), request_body = GrowRequest, responses((status = 200, description = "Makes a volume larger; a guest that runs from it is told", body = Volume)))]
async fn grow_volume(
    State(host): Shared,
    caller: Caller,
    At(name): At<String>,
    Input(request): Input<GrowRequest>,
) -> Answer<Volume> {
    call(host, caller, move |host, caller| host.grow_volume(caller, &name, request.bytes)).await
}

/// The attachments of volumes that the caller may see.
#[utoipa::path(get, path = "/v1/attachments", responses((status = 200, description = "The attachments of volumes that the caller may see", body = Vec<Attachment>)))]
async fn list_attachments(State(host): Shared, caller: Caller) -> Answer<Vec<Attachment>> {
    call(host, caller, move |host, caller| host.list_attachments(caller)).await
}

/// Attaches a volume to a VM.
#[utoipa::path(post, path = "/v1/attachments", request_body = AttachRequest, responses((status = 201, description = "Attaches a volume to a VM", body = Attachment)))]
async fn attach(
    State(host): Shared,
    caller: Caller,
    Input(request): Input<AttachRequest>,
) -> Result<(StatusCode, Json<Attachment>), Failure> {
    run(host, caller, move |host, caller| host.attach(caller, &request))
        .await
        .map(|made| (StatusCode::CREATED, Json(made)))
}

/// One attachment.
#[utoipa::path(get, path = "/v1/attachments/{vm}/{volume}", params(("vm" = String, Path, description = "The VM"), ("volume" = String, Path, description = "The volume")), responses((status = 200, description = "One attachment", body = Attachment)))]
async fn show_attachment(
    State(host): Shared,
    caller: Caller,
    At((vm, volume)): At<(String, String)>,
) -> Answer<Attachment> {
    call(host, caller, move |host, caller| host.show_attachment(caller, &vm, &volume)).await
}

/// Detaches a volume from a VM.
#[utoipa::path(delete, path = "/v1/attachments/{vm}/{volume}", params(("vm" = String, Path, description = "The VM"), ("volume" = String, Path, description = "The volume")), responses((status = 204, description = "Detaches a volume from a VM")))]
async fn detach(
    State(host): Shared,
    caller: Caller,
    At((vm, volume)): At<(String, String)>,
) -> Result<StatusCode, Failure> {
    run(host, caller, move |host, caller| host.detach(caller, &vm, &volume)).await.map(|()| StatusCode::NO_CONTENT)
}

/// Tries a worker once more, where too many have died.
#[utoipa::path(post, path = "/v1/attachments/{vm}/{volume}/resume", params(("vm" = String, Path, description = "The VM"), ("volume" = String, Path, description = "The volume")), responses((status = 204, description = "Tries a worker once more, where too many have died")))]
async fn resume(
    State(host): Shared,
    caller: Caller,
    At((vm, volume)): At<(String, String)>,
) -> Result<StatusCode, Failure> {
    run(host, caller, move |host, caller| host.resume(caller, &vm, &volume)).await.map(|()| StatusCode::NO_CONTENT)
}

/// Has every backend go on with the program that is installed now.
#[utoipa::path(post, path = "/v1/upgrade", responses((status = 200, description = "Has every backend go on with the program that is installed now", body = Vec<Upgraded>)))]
async fn upgrade(State(host): Shared, caller: Caller) -> Answer<Vec<Upgraded>> {
    call(host, caller, move |host, caller| host.upgrade(caller)).await
}

/// The VMs, and what they run.
#[utoipa::path(get, path = "/v1/vms", responses((status = 200, description = "The VMs, and what they run", body = Vec<Vm>)))]
async fn list_vms(State(host): Shared, caller: Caller) -> Answer<Vec<Vm>> {
    call(host, caller, move |host, caller| host.list_vms(caller)).await
}

/// The deployments, the newest first.
#[utoipa::path(get, path = "/v1/deployments", responses((status = 200, description = "The deployments, the newest first", body = Vec<Deployment>)))]
async fn list_deployments(State(host): Shared, caller: Caller) -> Answer<Vec<Deployment>> {
    call(host, caller, move |host, caller| host.list_deployments(caller)).await
}

/// Gives an image to the volumes of a group of VMs.
#[utoipa::path(post, path = "/v1/deployments", request_body = DeployRequest, responses((status = 201, description = "Gives an image to the volumes of a group of VMs", body = Deployment)))]
async fn deploy(
    State(host): Shared,
    caller: Caller,
    Input(request): Input<DeployRequest>,
) -> Result<(StatusCode, Json<Deployment>), Failure> {
    run(host, caller, move |host, caller| host.deploy(caller, &request))
        .await
        .map(|made| (StatusCode::CREATED, Json(made)))
}

/// One deployment.
#[utoipa::path(get, path = "/v1/deployments/{id}", params(("id" = i64, Path, description = "The deployment")), responses((status = 200, description = "One deployment", body = Deployment)))]
async fn show_deployment(State(host): Shared, caller: Caller, At(id): At<i64>) -> Answer<Deployment> {
    call(host, caller, move |host, caller| host.show_deployment(caller, id)).await
}

/// Takes a deployment back where it has not arrived yet.
#[utoipa::path(post, path = "/v1/deployments/{id}/abort", params(("id" = i64, Path, description = "The deployment")), responses((status = 200, description = "Takes a deployment back where it has not arrived yet", body = Deployment)))]
async fn abort_deployment(State(host): Shared, caller: Caller, At(id): At<i64>) -> Answer<Deployment> {
    call(host, caller, move |host, caller| host.abort_deployment(caller, id)).await
}

/// Takes a deployment back everywhere.
#[utoipa::path(post, path = "/v1/deployments/{id}/rollback", params(("id" = i64, Path, description = "The deployment")), responses((status = 200, description = "Takes a deployment back everywhere", body = Deployment)))]
async fn roll_deployment_back(State(host): Shared, caller: Caller, At(id): At<i64>) -> Answer<Deployment> {
    call(host, caller, move |host, caller| host.roll_deployment_back(caller, id)).await
}

/// All groups.
#[utoipa::path(get, path = "/v1/groups", responses((status = 200, description = "All groups", body = Vec<Group>)))]
async fn list_groups(State(host): Shared, caller: Caller) -> Answer<Vec<Group>> {
    call(host, caller, move |host, caller| host.list_groups(caller)).await
}

/// Makes a group, if there is none.
#[utoipa::path(put, path = "/v1/groups/{name}", params(("name" = String, Path, description = "The group")), responses((status = 200, description = "Makes a group, if there is none", body = Group)))]
async fn put_group(State(host): Shared, caller: Caller, At(name): At<String>) -> Answer<Group> {
    call(host, caller, move |host, caller| host.put_group(caller, &name)).await
}

/// One group.
#[utoipa::path(get, path = "/v1/groups/{name}", params(("name" = String, Path, description = "The group")), responses((status = 200, description = "One group", body = Group)))]
async fn show_group(State(host): Shared, caller: Caller, At(name): At<String>) -> Answer<Group> {
    call(host, caller, move |host, caller| host.show_group(caller, &name)).await
}

/// Removes a group.
#[utoipa::path(delete, path = "/v1/groups/{name}", params(("name" = String, Path, description = "The group")), responses((status = 204, description = "Removes a group")))]
async fn remove_group(State(host): Shared, caller: Caller, At(name): At<String>) -> Result<StatusCode, Failure> {
    run(host, caller, move |host, caller| host.remove_group(caller, &name)).await.map(|()| StatusCode::NO_CONTENT)
}

/// Adds a member to a group.
#[utoipa::path(post, path = "/v1/groups/{name}/members", params(("name" = String, Path, description = "The group")), request_body = MemberRequest, responses((status = 200, description = "Adds a member to a group", body = Group)))]
async fn add_member(
    State(host): Shared,
    caller: Caller,
    At(name): At<String>,
    Input(request): Input<MemberRequest>,
) -> Answer<Group> {
    call(host, caller, move |host, caller| host.add_member(caller, &name, &request.member)).await
}

/// Takes a member out of a group.
#[utoipa::path(delete, path = "/v1/groups/{name}/members/{member}", params(("name" = String, Path, description = "The group"), ("member" = String, Path, description = "The member")), responses((status = 200, description = "Takes a member out of a group", body = Group)))]
async fn remove_member(State(host): Shared, caller: Caller, At((name, member)): At<(String, String)>) -> Answer<Group> {
    call(host, caller, move |host, caller| host.remove_member(caller, &name, &member)).await
}

/// Lets a group do something.
#[utoipa::path(post, path = "/v1/groups/{name}/grants", params(("name" = String, Path, description = "The group")), request_body = Grant, responses((status = 200, description = "Lets a group do something", body = Group)))]
async fn add_grant(
    State(host): Shared,
    caller: Caller,
    At(name): At<String>,
    Input(grant): Input<Grant>,
) -> Answer<Group> {
    call(host, caller, move |host, caller| host.add_grant(caller, &name, &grant)).await
}

/// No longer lets a group do something.
#[utoipa::path(delete, path = "/v1/groups/{name}/grants", params(("name" = String, Path, description = "The group"), Grant), responses((status = 200, description = "No longer lets a group do something", body = Group)))]
async fn remove_grant(
    State(host): Shared,
    caller: Caller,
    At(name): At<String>,
    Asked(grant): Asked<Grant>,
) -> Answer<Group> {
    call(host, caller, move |host, caller| host.remove_grant(caller, &name, &grant)).await
}

/// The audit log, the oldest records first.
#[utoipa::path(get, path = "/v1/audit", params(LogQuery), responses((status = 200, description = "The audit log, the oldest records first", body = Vec<AuditRecord>)))]
async fn audit(State(host): Shared, caller: Caller, Asked(query): Asked<LogQuery>) -> Answer<Vec<AuditRecord>> {
    call(host, caller, move |host, caller| host.audit(caller, &query)).await
}

/// The jobs, the newest first.
#[utoipa::path(get, path = "/v1/jobs", responses((status = 200, description = "The jobs, the newest first", body = Vec<Job>)))]
async fn list_jobs(State(host): Shared, caller: Caller) -> Answer<Vec<Job>> {
    call(host, caller, move |host, caller| host.list_jobs(caller)).await
}

/// Asks a job to stop.
#[utoipa::path(delete, path = "/v1/jobs/{id}", params(("id" = i64, Path, description = "The job")), responses((status = 200, description = "Asks a job to stop", body = Job)))]
async fn cancel_job(State(host): Shared, caller: Caller, At(id): At<i64>) -> Answer<Job> {
    call(host, caller, move |host, caller| host.cancel_job(caller, id)).await
}

/// How much each attached volume has done.
#[utoipa::path(get, path = "/v1/load", responses((status = 200, description = "How much each attached volume has done", body = Vec<Load>)))]
async fn load(State(host): Shared, caller: Caller) -> Answer<Vec<Load>> {
    call(host, caller, move |host, caller| host.load(caller)).await
}

/// One job, perhaps after it has made progress.
#[utoipa::path(get, path = "/v1/jobs/{id}", params(("id" = i64, Path, description = "The job"), JobQuery), responses((status = 200, description = "The job", body = Job)))]
async fn show_job(State(host): Shared, caller: Caller, At(id): At<i64>, Asked(query): Asked<JobQuery>) -> Answer<Job> {
    const LOOKS_EVERY: Duration = Duration::from_millis(20);
    const PATIENCE_MS_MAX: u64 = 30_000;
    let wait_ms = query.wait_ms.unwrap_or(0);
    if wait_ms > PATIENCE_MS_MAX {
        let detail = format!("wait_ms is {wait_ms}: expected at most {PATIENCE_MS_MAX}");
        return Err(Failure::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid", detail));
    }
    let patience = Duration::from_millis(wait_ms);
    let begun = Instant::now();
    let look = |host: &Arc<Host>| call(Arc::clone(host), caller.clone(), move |host, caller| host.show_job(caller, id));
    let first = look(&host).await?;
    // What has come on since somebody asked is told at once, whatever the patience.
    let mut job = first.0.clone();
    while job.state == JobState::Running && job.done_bytes == first.0.done_bytes && begun.elapsed() < patience {
        tokio::time::sleep(LOOKS_EVERY).await;
        job = look(&host).await?.0;
    }
    Ok(Json(job))
}
