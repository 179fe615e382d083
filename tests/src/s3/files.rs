//! `s3s-fs` with one difference: it sends objects' bytes in large pieces. By itself it reads 4 KiB at a time, each
//! on another thread, and then takes most of a small machine for itself, whatever its clients do.

use async_trait::async_trait;
use s3s::{
    S3, S3Request, S3Response, S3Result,
    dto::{
        AbortMultipartUploadInput, AbortMultipartUploadOutput, CompleteMultipartUploadInput,
        CompleteMultipartUploadOutput, CreateMultipartUploadInput, CreateMultipartUploadOutput, DeleteObjectInput,
        DeleteObjectOutput, GetBucketLocationInput, GetBucketLocationOutput, GetObjectInput, GetObjectOutput,
        HeadBucketInput, HeadBucketOutput, HeadObjectInput, HeadObjectOutput, ListBucketsInput, ListBucketsOutput,
        ListObjectsInput, ListObjectsOutput, ListObjectsV2Input, ListObjectsV2Output, PutObjectInput, PutObjectOutput,
        Range, StreamingBlob, UploadPartInput, UploadPartOutput,
    },
    s3_error,
};
use s3s_fs::FileSystem;
use tokio::{
    fs::File,
    io::{AsyncReadExt as _, AsyncSeekExt as _, SeekFrom},
};
use tokio_util::io::ReaderStream;

/// Bytes read and sent at once.
const PIECE: usize = 256 << 10;

/// Objects as files below a folder.
pub(super) struct Files {
    /// The folder: objects are at `bucket/key`.
    pub(super) root: std::path::PathBuf,
    pub(super) inner: FileSystem,
}

/// What is left to `s3s-fs`.
macro_rules! as_it_is {
    ($($call:ident($input:ty) -> $output:ty;)*) => {
        #[async_trait]
        impl S3 for Files {
            async fn get_object(&self, request: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
                self.in_large_pieces(request).await
            }
            $(async fn $call(&self, request: S3Request<$input>) -> S3Result<S3Response<$output>> {
                self.inner.$call(request).await
            })*
        }
    };
}

as_it_is! {
    abort_multipart_upload(AbortMultipartUploadInput) -> AbortMultipartUploadOutput;
    complete_multipart_upload(CompleteMultipartUploadInput) -> CompleteMultipartUploadOutput;
    create_multipart_upload(CreateMultipartUploadInput) -> CreateMultipartUploadOutput;
    delete_object(DeleteObjectInput) -> DeleteObjectOutput;
    get_bucket_location(GetBucketLocationInput) -> GetBucketLocationOutput;
    head_bucket(HeadBucketInput) -> HeadBucketOutput;
    head_object(HeadObjectInput) -> HeadObjectOutput;
    list_buckets(ListBucketsInput) -> ListBucketsOutput;
    list_objects(ListObjectsInput) -> ListObjectsOutput;
    list_objects_v2(ListObjectsV2Input) -> ListObjectsV2Output;
    put_object(PutObjectInput) -> PutObjectOutput;
    upload_part(UploadPartInput) -> UploadPartOutput;
}

impl Files {
    async fn in_large_pieces(&self, request: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let GetObjectInput { bucket, key, range, .. } = &request.input;
        let start = match range {
            None => Some(0),
            Some(Range::Int { first, .. }) => Some(*first),
            Some(Range::Suffix { .. }) => None,
        };
        // It has been found to be within the folder once the answer is there.
        let path = self.root.join(bucket).join(key);
        let mut answer = self.inner.get_object(request).await?;
        let length = answer.output.content_length.and_then(|length| u64::try_from(length).ok());
        if let (Some(start), Some(length)) = (start, length) {
            let mut file = File::open(path).await.map_err(|error| s3_error!(error, InternalError))?;
            file.seek(SeekFrom::Start(start)).await.map_err(|error| s3_error!(error, InternalError))?;
            file.set_max_buf_size(PIECE);
            let content = ReaderStream::with_capacity(file.take(length), PIECE);
            answer.output.body = Some(StreamingBlob::wrap(content));
        }
        Ok(answer)
    }
}
